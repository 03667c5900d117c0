// Philox 4x32 with 10 rounds on the device: the counters of cpu/philox.h, one at a time.
#pragma once

#include "cuda/device.h"

namespace fused_attn::device {

class Philox {
 public:
  FUSED_ATTN_DEVICE Philox(int64_t seed, int64_t offset)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        offset_(static_cast<uint32_t>(offset)) {}

  // The four words of the block (a, b, c, offset).
  FUSED_ATTN_DEVICE void draw(uint32_t a, uint32_t b, uint32_t c, uint32_t (&word)[4]) const {
    uint32_t w0 = a, w1 = b, w2 = c, w3 = offset_;
    uint32_t key0 = key_[0], key1 = key_[1];
    FUSED_ATTN_UNROLL_LOOP
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = multiply_high(w0, 0xD2511F53u), low0 = w0 * 0xD2511F53u;
      const uint32_t high1 = multiply_high(w2, 0xCD9E8D57u), low1 = w2 * 0xCD9E8D57u;
      w0 = high1 ^ w1 ^ key0;
      w1 = low1;
      w2 = high0 ^ w3 ^ key1;
      w3 = low0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    word[0] = w0;
    word[1] = w1;
    word[2] = w2;
    word[3] = w3;
  }

 private:
  uint32_t key_[2];
  uint32_t offset_;
};

}  // namespace fused_attn::device
