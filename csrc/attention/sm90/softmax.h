// The running softmax of two rows per thread (Milakov, Gimelshein, "Online normalizer calculation
// for softmax", 2018), on accumulator fragments. Four threads share a row.
#pragma once

#include "cuda/device.h"

namespace fused_attn::attention {

// Beyond this |score| in base 2 the rounding of a row's shift shows, and from 2^31 on overflows its
// exponentials: the largest score is taken off the scores first, and nothing after that.
constexpr float kMaxShift = 4096.0f;

struct OnlineSoftmax {
  float max[2], sum[2];

  FUSED_ATTN_DEVICE OnlineSoftmax()
      : max{-device::infinity(), -device::infinity()}, sum{0.0f, 0.0f} {}

  // scores -> exp(multiplier * (scores - max)) in base 2; `correction` is what sums so far, and
  // what was accumulated with them, have to be multiplied by. `kHidden`: there may be rows of
  // nothing but -inf so far.
  template <bool kHidden, int kCount>
  FUSED_ATTN_DEVICE void step(float (&scores)[kCount], float multiplier, float (&correction)[2]) {
    float new_max[2] = {max[0], max[1]};
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      new_max[i >> 1 & 1] = device::largest(new_max[i >> 1 & 1], scores[i]);
    }
    float base[2], shift[2];
    FUSED_ATTN_UNROLL_LOOP
    for (int row = 0; row < 2; ++row) {
      new_max[row] = over_row(new_max[row], Largest());
      base[row] = kHidden && new_max[row] == -device::infinity() ? 0.0f : new_max[row];
      shift[row] = base[row] * multiplier;
      // 1 where the largest score stays the same: a factor near it would add up over the tiles.
      correction[row] = device::exp2_fast((max[row] - base[row]) * multiplier);
      max[row] = new_max[row];
      sum[row] *= correction[row];
    }
    if (device::largest(device::magnitude(shift[0]), device::magnitude(shift[1])) > kMaxShift) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kCount; ++i) scores[i] -= base[i >> 1 & 1];
      shift[0] = shift[1] = 0.0f;
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      const int row = i >> 1 & 1;
      scores[i] = device::exp2_fast(device::multiply_add(scores[i], multiplier, -shift[row]));
      sum[row] += scores[i];
    }
  }

  // Adds up what the four threads of each row have summed.
  FUSED_ATTN_DEVICE void finish() {
    sum[0] = over_row(sum[0], Plus());
    sum[1] = over_row(sum[1], Plus());
  }

  // ln(sum exp(score)) of a row, whose scores are `scale` times those of the steps; -inf for one
  // that sees nothing.
  FUSED_ATTN_DEVICE float lse(int row, float scale) const {
    constexpr float kLn2 = 0.693147180559945f;
    if (sum[row] == 0.0f) return -device::infinity();
    return device::multiply_add(max[row], scale, device::log2_fast(sum[row]) * kLn2);
  }

 private:
  struct Largest {
    FUSED_ATTN_DEVICE float operator()(float a, float b) const { return device::largest(a, b); }
  };
  struct Plus {
    FUSED_ATTN_DEVICE float operator()(float a, float b) const { return a + b; }
  };
  template <class Operation>
  static FUSED_ATTN_DEVICE float over_row(float x, Operation operation) {
    x = operation(x, device::shuffle_xor(x, 1));
    return operation(x, device::shuffle_xor(x, 2));
  }
};

}  // namespace fused_attn::attention
