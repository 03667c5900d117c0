// The running softmax of Milakov and Gimelshein, "Online normalizer calculation for softmax"
// (arXiv:1805.02867): the largest score and the sum of exponentials of each query, corrected
// whenever a larger score turns up.
#pragma once

#include "attention/cpu/score.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

template <class Real>
struct RunningSoftmax {
  alignas(64) Real largest[kBlockQ];   // score so far, in the tile's own scale
  alignas(64) Real previous[kBlockQ];  // its value before this tile (plain: scaled, negated)
  alignas(64) Real sum[kBlockQ];       // of exponentials relative to `largest`
  alignas(64) Real correction[kBlockQ];

  void reset(bool plain, Real log2_scale) {
    for (int q = 0; q < kBlockQ; ++q) {
      largest[q] = plain ? hidden_score<Real>(true) : std::numeric_limits<Real>::lowest();
      previous[q] = plain ? -largest[q] * log2_scale : largest[q];
      sum[q] = 0;
    }
  }
};

// What turns exponentials relative to `before` into those relative to `now`: values of `previous`.
template <bool kPlain, class V>
FUSED_ATTN_INLINE V correction_of(V before, V now) {
  return kPlain ? exp2(now - before) : exp(clamp_exponent(before - now));
}

// Replaces the scores of a tile by their exponentials, in the units of the product with V:
// probabilities[key unit][query] may be the same memory as scores. `keep` is the dropout mask.
template <class E, bool kPlain, bool kDropout>
inline void softmax_tile(const TileMap& map, int groups, typename E::Real log2_scale,
                         const uint64_t* keep, typename E::Real* scores,
                         typename E::Unit* probabilities, RunningSoftmax<typename E::Real>& state) {
  using Real = typename E::Real;
  using V = Vec<Real>;
  const V scale = V::set1(log2_scale);
  for (int q = 0; q < groups * kLanes; q += kLanes) {
    V now = V::load(state.largest + q);
    const V before = V::load(state.previous + q);
    if (kPlain) now = V::zero() - now * scale;
    const V correction = correction_of<kPlain>(before, now);
    correction.store(state.correction + q);
    (V::load(state.sum + q) * correction).store(state.sum + q);
    now.store(state.previous + q);
  }
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      const V largest = V::load(state.largest + g * kLanes);
      const V offset = V::load(state.previous + g * kLanes);
      // Of this segment alone: one running sum over all keys would lose twice as many bits.
      V sum = V::zero();
      auto exponential = [&](int c) {
        const V score = V::load(scores + c * kBlockQ + g * kLanes);
        const V p = kPlain ? exp2<E::kPrecision>(fma(score, scale, offset))
                           : exp<E::kPrecision>(clamp_exponent(score - largest));
        sum = sum + p;
        return kDropout ? select(lanes_of(keep, c, g), p, V::zero()) : p;
      };
      if constexpr (E::kPair == 1) {
        for (int c = segment.begin; c < segment.end; ++c) {
          exponential(c).store(probabilities + c * kBlockQ + g * kLanes);
        }
      } else {
        for (int c = segment.begin; c < segment.end; c += 2) {
          const V even = exponential(c);
          const V odd = c + 1 < segment.end ? exponential(c + 1) : V::zero();
          pack_pairs(even, odd).store(probabilities + c / 2 * kBlockQ + g * kLanes);
        }
      }
      (V::load(state.sum + g * kLanes) + sum).store(state.sum + g * kLanes);
    }
  }
}

// What the accumulated output is to be multiplied with, and lse.
template <class Real>
inline void finish(const RunningSoftmax<Real>& state, const ScoreFormula<Real>& formula,
                   const Dropout& dropout, int rows, Real* factor, Real* lse) {
  const Real scale = formula.plain ? formula.scale : Real(1);
  for (int q = 0; q < kBlockQ; ++q) {
    const bool hidden =
        q >= rows || (formula.plain && state.largest[q] <= hidden_score<Real>(true));
    const Real sum = hidden ? Real(0) : state.sum[q];
    // Not `sum > 0`: a NaN must reach the output.
    factor[q] = sum == 0 ? Real(0) : static_cast<Real>(dropout.factor()) / sum;
    lse[q] = sum == 0 ? -std::numeric_limits<Real>::infinity()
                      : state.largest[q] * scale + std::log(sum);
  }
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
