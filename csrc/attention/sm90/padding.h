// The keys that a block of queries may see: one bit each in shared memory, found once, from the key
// padding mask and from what a bool mask hides as a whole.
#pragma once

#include "attention/sm90/mask_tile.h"

namespace fused_attn::attention {

// What a key tile needs: nothing at all, a look at every element, or no mask.
enum class TileKind { kSkip, kMasked, kPlain };

// A tile that a bool mask hides from the whole block looks like one of nothing but padding. A bool
// mask of more keys than there are bits for hides no tiles, only elements.
template <class Config>
class PaddingBits {
  static_assert(Config::kBlockN % 32 == 0, "whole words of bits a tile");
  static constexpr int kWords = Config::kBlockN / 32;

 public:
  // `bits`: shared memory for a bit per key. Without masks nothing is read or written.
  FUSED_ATTN_DEVICE PaddingBits(const DeviceProblem& p, SharedAddress bits) : p_(p), bits_(bits) {}

  // Looked up whenever it is asked for: the loops over tiles have no register for it.
  FUSED_ATTN_DEVICE bool present() const { return p_.key_bits; }

  // Fills the bits of tiles [begin, end), all warps of the block together; a barrier must follow.
  // `hidden(tile)`: does a bool mask hide it as a whole? For a warp.
  template <class Hidden>
  FUSED_ATTN_DEVICE void fill(int batch, int begin, int end, int key_end,
                              const Hidden& hidden) const {
    if (!present()) return;
    const uint8_t* const row =
        p_.key_padding == nullptr ? nullptr : p_.key_padding + batch * p_.key_padding_stride[0];
    const int warp = device::thread_index() / device::kWarpThreads;
    const int lane = device::thread_index() % device::kWarpThreads;
    FUSED_ATTN_KEEP_LOOP
    for (int tile = begin + warp; tile < end; tile += Config::kThreads / device::kWarpThreads) {
      uint32_t bits[kWords], any = 0;
      FUSED_ATTN_UNROLL_LOOP
      for (int w = 0; w < kWords; ++w) {
        const int key = tile * Config::kBlockN + 32 * w + lane;
        bits[w] = device::ballot(key < key_end &&
                                 (row == nullptr || row[key * p_.key_padding_stride[1]] != 0));
        any |= bits[w];
      }
      const bool skip = any == 0 || hidden(tile);
      FUSED_ATTN_UNROLL_LOOP
      for (int w = 0; w < kWords; ++w) {
        if (lane == w) device::shared_store(word_at(tile, w), skip ? 0u : bits[w]);
      }
    }
  }

  FUSED_ATTN_DEVICE uint32_t word(int tile, int which) const {
    return device::shared_load_word(word_at(tile, which));
  }

  // Of a tile that has a visible key, and is `plain` but for the padding.
  FUSED_ATTN_DEVICE TileKind kind(int tile, bool plain) const {
    if (!present()) return plain ? TileKind::kPlain : TileKind::kMasked;
    uint32_t any = 0, all = ~0u;
    FUSED_ATTN_UNROLL_LOOP
    for (int w = 0; w < kWords; ++w) {
      const uint32_t bits = word(tile, w);
      any |= bits;
      all &= bits;
    }
    if (any == 0) return TileKind::kSkip;
    return plain && all == ~0u ? TileKind::kPlain : TileKind::kMasked;
  }

 private:
  FUSED_ATTN_DEVICE SharedAddress word_at(int tile, int which) const {
    return bits_ + 4 * (tile * kWords + which);
  }

  const DeviceProblem& p_;
  SharedAddress bits_;
};

}  // namespace fused_attn::attention
