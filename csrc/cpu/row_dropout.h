// Which elements of a row survive its dropout: Philox 4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011, section 3.3), 16 counters at once.
//
// Column j of row i draws word j & 3 of the block with counter (j >> 2, low word of i, high word of
// i, low word of the offset) and key (low, high word of the seed), on every backend.
#pragma once

#include "cpu/philox.h"
#include "cpu/vec.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

class Dropout {
 public:
  Dropout(const int64_t* rng, double p)
      : key_{static_cast<uint32_t>(rng[0]),
             static_cast<uint32_t>(static_cast<uint64_t>(rng[0]) >> 32)},
        offset_(static_cast<uint32_t>(rng[1])),
        all_(p >= 1.0),
        threshold_(all_ ? 0 : static_cast<uint32_t>(p * 4294967296.0)),
        scale_(all_ ? 0.0 : 1.0 / (1.0 - p)) {}

  double scale() const { return scale_; }

  static int64_t masks(int64_t width) { return (width + 63) / 64 * 4; }

  // Bit b of keep[m] tells whether column 16 * m + b stays; writes masks(width) of them.
  void draw(int64_t row, int64_t width, Mask* keep) const { draw(row, 0, width, keep); }

  // The same for the `width` columns from `begin`, a multiple of 64, on.
  void draw(int64_t row, int64_t begin, int64_t width, Mask* keep) const {
    alignas(64) uint32_t first[kLanes];
    for (uint32_t lane = 0; lane < kLanes; ++lane) first[lane] = lane;
    const VecU lanes = VecU::load(first), threshold = VecU::set1(threshold_);
    const uint64_t index = static_cast<uint64_t>(row);
    const VecU row_low = VecU::set1(static_cast<uint32_t>(index));
    const VecU row_high = VecU::set1(static_cast<uint32_t>(index >> 32));
    const uint32_t first_quad = static_cast<uint32_t>(begin / 4);
    for (int64_t m = 0; m < masks(width); m += 4) {
      VecU word[4] = {lanes + VecU::set1(first_quad + static_cast<uint32_t>(m) * 4), row_low,
                      row_high, VecU::set1(offset_)};
      philox_rounds(key_[0], key_[1], word);
      uint64_t bits = 0;
      FUSED_ATTN_UNROLL
      for (int w = 0; w < 4; ++w) bits |= spread(not_below(word[w], threshold)) << w;
      if (all_) bits = 0;
      for (int part = 0; part < 4; ++part) keep[m + part] = static_cast<Mask>(bits >> 16 * part);
    }
  }

 private:
  // Bit i of `mask` to bit 4 * i: lane i of word w is column 4 * i + w.
  static FUSED_ATTN_INLINE uint64_t spread(Mask mask) {
    uint64_t bits = mask;
    bits = (bits | bits << 24) & 0x000000ff000000ffull;
    bits = (bits | bits << 12) & 0x000f000f000f000full;
    bits = (bits | bits << 6) & 0x0303030303030303ull;
    return (bits | bits << 3) & 0x1111111111111111ull;
  }

  uint32_t key_[2];
  uint32_t offset_;
  bool all_;
  uint32_t threshold_;
  double scale_;
};

}  // namespace fused_attn::FUSED_ATTN_LEVEL
