// What a bool mask leaves of a tile: asked for all tiles before a block begins, so that those it
// hides as a whole are neither loaded nor visited, at no cost to the loop over the others.
#pragma once

#include "attention/sm90/visibility.h"

namespace fused_attn::attention {

// The tile of one head's mask from `query_begin` and `key_begin` on, as far as there are queries
// and keys, of each one at least; nothing else is read.
template <class Config>
class MaskTile {
 public:
  FUSED_ATTN_DEVICE MaskTile(const DeviceProblem& p, const Sequence& sequence, const Band& band,
                             int head, int query_begin, int key_begin)
      : data_(p.mask.at<uint8_t>(sequence.batch, head, query_begin) + key_begin * p.mask.stride[3]),
        row_stride_(p.mask.stride[2]),
        column_stride_(p.mask.stride[3]),
        rows_(row_stride_ == 0 ? 1 : smaller(Config::kBlockM, sequence.seqlen_q - query_begin)),
        columns_(column_stride_ == 0 ? 1 : smaller(Config::kBlockN, band.key_end() - key_begin)) {}

  // Is there a visible element? For a warp, which stops where it finds the first: dense masks cost
  // a few rows a tile.
  FUSED_ATTN_DEVICE bool any_visible() const {
    if (made_of<sizeof(Quad)>()) return find<Quad>();
    if (made_of<sizeof(uint32_t)>()) return find<uint32_t>();
    return find<uint8_t>();
  }

 private:
  struct alignas(16) Quad {
    uint32_t word[4];
  };
  static FUSED_ATTN_DEVICE bool shows(const Quad& x) {
    return (x.word[0] | x.word[1] | x.word[2] | x.word[3]) != 0;
  }
  static FUSED_ATTN_DEVICE bool shows(uint32_t x) { return x != 0; }

  // Whole rows of aligned pieces of that many bytes?
  template <int kBytes>
  FUSED_ATTN_DEVICE bool made_of() const {
    return column_stride_ == 1 && columns_ % kBytes == 0 && row_stride_ % kBytes == 0 &&
           reinterpret_cast<uintptr_t>(data_) % kBytes == 0;
  }

  // Lanes take one piece after the other, row after row.
  template <class Piece>
  FUSED_ATTN_DEVICE bool find() const {
    constexpr int kAtOnce = sizeof(Piece) == 16 ? 4 : 16;  // loads in flight before lanes vote
    constexpr int kBytes = sizeof(Piece);
    const int a_row = columns_ / kBytes;
    const int rows_a_step = device::kWarpThreads / a_row, rest = device::kWarpThreads % a_row;
    const int lane = device::thread_index() % device::kWarpThreads;
    int row = lane / a_row, piece = lane % a_row;
    FUSED_ATTN_KEEP_LOOP
    for (int done = 0; done < rows_ * a_row; done += kAtOnce * device::kWarpThreads) {
      Piece found[kAtOnce] = {};
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kAtOnce; ++i) {
        if (row < rows_) {
          found[i] = *reinterpret_cast<const Piece*>(data_ + row * row_stride_ +
                                                     piece * kBytes * column_stride_);
        }
        row += rows_a_step;
        piece += rest;
        if (piece >= a_row) {
          piece -= a_row;
          ++row;
        }
      }
      bool visible = false;
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kAtOnce; ++i) visible = visible || shows(found[i]);
      if (device::ballot(visible) != 0) return true;
    }
    return false;
  }

  const uint8_t* data_;
  int64_t row_stride_, column_stride_;
  int rows_, columns_;
};

}  // namespace fused_attn::attention
