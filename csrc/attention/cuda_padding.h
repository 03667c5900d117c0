// The key padding mask of a block: one bit a key in shared memory, read once.
#pragma once

#include "attention/cuda_visibility.h"

namespace fused_attn::attention {

// What a key tile needs: nothing at all, a look at every element, or no mask.
enum class TileKind { kSkip, kMasked, kPlain };

template <int kBlockN, int kThreads>
class PaddingBits {
  static_assert(kBlockN % 32 == 0, "whole words of bits a tile");
  static constexpr int kWords = kBlockN / 32;

 public:
  // `bits`: shared memory for a bit per key. Without a mask nothing is read or written.
  FUSED_ATTN_DEVICE PaddingBits(const DeviceProblem& p, const Sequence& sequence,
                                SharedAddress bits)
      : bits_(bits),
        stride_(p.key_padding_stride[1]),
        row_(p.key_padding == nullptr ? nullptr
                                      : p.key_padding + sequence.batch * p.key_padding_stride[0]) {}

  FUSED_ATTN_DEVICE bool present() const { return row_ != nullptr; }

  // Fills the bits of tiles [begin, end), all warps of the block together; a barrier must follow.
  FUSED_ATTN_DEVICE void fill(int begin, int end, int key_end) const {
    if (!present()) return;
    const int warp = device::thread_index() / device::kWarpThreads;
    const int lane = device::thread_index() % device::kWarpThreads;
    const int warps = kThreads / device::kWarpThreads;
    for (int word = begin * kWords + warp; word < end * kWords; word += warps) {
      const int key = word * 32 + lane;
      const uint32_t visible = device::ballot(key < key_end && row_[key * stride_] != 0);
      if (lane == 0) device::shared_store(bits_ + 4 * word, visible);
    }
  }

  FUSED_ATTN_DEVICE uint32_t word(int tile, int which) const {
    return device::shared_load_word(bits_ + 4 * (tile * kWords + which));
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
  SharedAddress bits_;
  int64_t stride_;
  const uint8_t* row_;
};

}  // namespace fused_attn::attention
