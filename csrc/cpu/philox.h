// The counter-based random numbers of dropout: Philox 4x32 with 10 rounds (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011), 16 counters at once.
//
// Key position j of query i in head n = b * H + h draws word j & 3 of the block with counter
// (j >> 2, i, n, low word of the offset) and key (low, high word of the seed), on every backend.
#pragma once

#include "cpu/vec.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// The ten rounds on a counter of four words, which become the result.
FUSED_ATTN_INLINE void philox_rounds(uint32_t key0, uint32_t key1, VecU (&word)[4]) {
  for (int round = 0; round < 10; ++round) {
    VecU low0, high0, low1, high1;
    multiply_wide(word[0], 0xD2511F53u, low0, high0);
    multiply_wide(word[2], 0xCD9E8D57u, low1, high1);
    word[0] = high1 ^ word[1] ^ VecU::set1(key0);
    word[2] = high0 ^ word[3] ^ VecU::set1(key1);
    word[1] = low1;
    word[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

struct Philox {
  uint32_t key[2];
  uint32_t offset;

  Philox(int64_t seed, int64_t offset_)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)},
        offset(static_cast<uint32_t>(offset_)) {}

  // word[w] lane l belongs to key position 4 * block + w and query position[l].
  FUSED_ATTN_INLINE void draw(uint32_t block, VecU position, uint32_t head, VecU (&word)[4]) const {
    word[0] = VecU::set1(block);
    word[1] = position;
    word[2] = VecU::set1(head);
    word[3] = VecU::set1(offset);
    philox_rounds(key[0], key[1], word);
  }
};

}  // namespace fused_attn::FUSED_ATTN_LEVEL
