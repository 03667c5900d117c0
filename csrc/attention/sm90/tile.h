// Tile sizes and the shared memory of the attention kernels, and how tiles lie there.
//
// A tile of R rows x D 16-bit columns is D / 64 panels (rounded up), each R rows of 128 bytes under
// the 128-byte swizzle: what one tensor-map copy writes and what wgmma's descriptors read.
#pragma once

#include "attention/sm90/visibility.h"

namespace fused_attn::attention {

template <int kRows, int kColumns>
struct SharedTile {
  static_assert(kColumns % 16 == 0 && kRows % 8 == 0, "steps of 16 columns, swizzles of 8 rows");
  static constexpr int kPanels = (kColumns + kTileColumns - 1) / kTileColumns;
  static constexpr int kPanelBytes = kRows * kTileRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  // Bits of a shared-memory descriptor of wgmma (PTX ISA, "Matrix descriptor"): address, leading
  // and stride offsets in units of 16 bytes, 128-byte swizzle. 8 rows are 1024 bytes apart.
  static FUSED_ATTN_DEVICE uint64_t descriptor(SharedAddress tile, uint32_t leading) {
    return static_cast<uint64_t>((tile & 0x3ffff) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 |
           1ull << 62;
  }
  // Rows are M or N, columns are K: 16 columns a step.
  static FUSED_ATTN_DEVICE uint64_t by_rows(SharedAddress tile) { return descriptor(tile, 16); }
  static FUSED_ATTN_DEVICE constexpr uint64_t row_step(int step) {
    return static_cast<uint64_t>(step / 4 * kPanelBytes + step % 4 * 32) >> 4;
  }
  // Columns are M or N, rows are K: 16 rows a step.
  static FUSED_ATTN_DEVICE uint64_t by_columns(SharedAddress tile) {
    return descriptor(tile, kPanelBytes);
  }
  static FUSED_ATTN_DEVICE constexpr uint64_t column_step(int step) {
    return static_cast<uint64_t>(step * 16 * kTileRowBytes) >> 4;
  }
  // Where 8 columns of a row are, from a multiple of 8.
  static FUSED_ATTN_DEVICE SharedAddress chunk(SharedAddress tile, int row, int column) {
    return tile + column / kTileColumns * kPanelBytes + row * kTileRowBytes +
           ((column % kTileColumns / 8) ^ (row & 7)) * 16;
  }
};

// Fragments: register r of a thread holds element (row, column) of its warpgroup's 64 rows.
struct Fragment {
  int row;     // of registers 4 j and 4 j + 1; 4 j + 2 and 4 j + 3 are 8 rows below
  int column;  // of register 0; register 4 j is 8 j further, an odd one a column further

  FUSED_ATTN_DEVICE explicit Fragment(int thread)
      : row(thread / 32 * 16 + thread % 32 / 4), column(2 * (thread % 4)) {}
};

// The forward's tiles: kGroups consumer warpgroups of 64 queries each, kBlockN keys a step.
// `kGeneral`: scores are modified, masked by element or dropped.
template <class Element_, int kHeadDim_, int kGroups_, int kBlockN_, bool kPingPong_,
          bool kGeneral_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kBlockM = kGroups * 64;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = 2;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kThreads = (kGroups + 1) * device::kWarpgroupThreads;
  // Of 64 Ki registers a block, what ptxas gives each thread at launch, and what setmaxnreg makes
  // of it: the producer needs few, the consumers hold the accumulators.
  static constexpr int kLaunchRegisters = kGroups == 3 ? 128 : 168;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : kGeneral ? 56 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : kGeneral ? 224 : 232;

  using QTile = SharedTile<kBlockM, kHeadDim>;
  using KvTile = SharedTile<kBlockN, kHeadDim>;

  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KvTile::kBytes;
  static constexpr uint32_t kBarriers = kV + kStages * KvTile::kBytes;
  static constexpr uint32_t kPadding = kBarriers + 128;
  // The base is aligned to 1024 bytes by hand.
  static constexpr uint32_t kSharedBytes = kPadding + kMaxKeyBits / 8 + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "the tiles exceed the shared memory of an SM");
};

}  // namespace fused_attn::attention
