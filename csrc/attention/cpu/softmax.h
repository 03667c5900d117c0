// The running softmax of Milakov and Gimelshein, "Online normalizer calculation for softmax"
// (arXiv:1805.02867): the largest score and the sum of exponentials of each query, corrected
// whenever a larger score turns up.
#pragma once

#include "attention/cpu/score.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// What the exponentials of each query's scores are relative to: exponents are
// (score - base) * scale + offset, to base 2, in plain tiles, and score - base, to base e, in
// others.
template <class Real>
struct Shift {
  alignas(64) Real base[kBlockQ];
  alignas(64) Real offset[kBlockQ];
};

// Beyond this largest |score * scale| the base takes the place of the offset. A fused multiply-add
// makes an exponent with one rounding, but at 2^31 the offset's own overflows the exponential;
// without, a product is off by half a unit of its last place.
template <class Real>
constexpr Real kMaxOffset = kFusedMultiplyAdd ? 1 / std::numeric_limits<Real>::epsilon() : Real(16);

template <class Real>
struct RunningSoftmax {
  alignas(64) Real largest[kBlockQ];  // score so far, in the tile's own scale
  Shift<Real> shift;
  alignas(64) Real sum[kBlockQ];  // of exponentials relative to `shift`
  alignas(64) Real correction[kBlockQ];

  void reset() {
    for (int q = 0; q < kBlockQ; ++q) {
      largest[q] = shift.base[q] = kLowest<Real>;
      shift.offset[q] = sum[q] = 0;
    }
  }
};

// What turns exponentials relative to one shift into those relative to another. Largest scores only
// grow; where there was none, nothing has been summed and any number does.
template <bool kPlain, class Real>
FUSED_ATTN_INLINE Vec<Real> correction_between(const Shift<Real>& before, const Shift<Real>& now,
                                               int q, Vec<Real> scale) {
  using V = Vec<Real>;
  const V apart = V::load(before.base + q) - V::load(now.base + q);
  if constexpr (!kPlain) return exp(clamp_exponent(apart));
  const V offset = V::load(now.offset + q) - V::load(before.offset + q);
  return exp2(min(V::zero(), clamp_exponent(fma(apart, scale, offset))));
}

// Makes the exponents of 16 queries relative to their largest scores so far. Does any of them have
// a base in a plain tile?
template <bool kPlain, class Real>
FUSED_ATTN_INLINE bool renew_shift(const RunningSoftmax<Real>& state, int q, Vec<Real> scale,
                                   Shift<Real>& shift) {
  using V = Vec<Real>;
  const V largest = V::load(state.largest + q);
  if constexpr (!kPlain) {
    largest.store(shift.base + q);
    V::zero().store(shift.offset + q);
    return false;
  }
  // Queries that have seen nothing do without either: the exponential of their scores is 0.
  const Mask seen = greater(largest, V::set1(kLowest<Real>));
  const V scaled = select(seen, largest * scale, V::zero());
  const Mask large = greater(abs(scaled), V::set1(kMaxOffset<Real>));
  select(large, largest, V::zero()).store(shift.base + q);
  select(large, V::zero(), V::zero() - scaled).store(shift.offset + q);
  return large != 0;
}

// Is a score of this group of queries so low that its product with the scale overflows?
template <class Real>
inline bool overflows(const Segment& segment, int group, Real scale, const Real* scores) {
  using V = Vec<Real>;
  V least = V::zero();
  for (int c = segment.begin; c < segment.end; ++c) {
    least = min(least, V::load(scores + c * kStrideQ + group * kLanes));
  }
  return greater(V::set1(kLowest<Real> / 2 / scale), least) != 0;
}

// Takes the base off the scores of each group of queries that has one, or whose exponents would
// overflow: they then are as a plain tile's exponential takes them. Few tiles need it.
template <class Real>
FUSED_ATTN_NOINLINE void subtract_base(const TileMap& map, const bool (&has_base)[kGroups],
                                       Real scale, const Real* base, Real* scores) {
  using V = Vec<Real>;
  const V floor = V::set1(Real(-0x1p100));  // its exponential is 0, and its exponent finite
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      if (!has_base[g] && !(scale > 1 && overflows(segment, g, scale, scores))) continue;
      const V from = V::load(base + g * kLanes);
      for (int c = segment.begin; c < segment.end; ++c) {
        Real* at = scores + c * kStrideQ + g * kLanes;
        max(floor, V::load(at) - from).store(at);
      }
    }
  }
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
  const Shift<Real> before = state.shift;
  bool has_base[kGroups], any = log2_scale > 1;
  for (int g = 0; g < groups; ++g) {
    const int q = g * kLanes;
    any |= has_base[g] = renew_shift<kPlain>(state, q, scale, state.shift);
    const V correction = correction_between<kPlain>(before, state.shift, q, scale);
    correction.store(state.correction + q);
    (V::load(state.sum + q) * correction).store(state.sum + q);
  }
  if (kPlain && any) subtract_base(map, has_base, log2_scale, state.shift.base, scores);
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      const V base = V::load(state.shift.base + g * kLanes);
      const V offset = V::load(state.shift.offset + g * kLanes);
      // Of this segment alone: one running sum over all keys would lose twice as many bits.
      V sum = V::zero();
      auto exponential = [&](int c) {
        const V score = V::load(scores + c * kStrideQ + g * kLanes);
        const V p = kPlain ? exp2<E::kPrecision>(fma(score, scale, offset))
                           : exp<E::kPrecision>(clamp_natural(score - base));
        sum = sum + p;
        return kDropout ? select(lanes_of(keep, c, g), p, V::zero()) : p;
      };
      if constexpr (E::kPair == 1) {
        for (int c = segment.begin; c < segment.end; ++c) {
          exponential(c).store(probabilities + c * kStrideQ + g * kLanes);
        }
      } else {
        for (int c = segment.begin; c < segment.end; c += 2) {
          const V even = exponential(c);
          const V odd = c + 1 < segment.end ? exponential(c + 1) : V::zero();
          pack_pairs(even, odd).store(probabilities + c / 2 * kStrideQ + g * kLanes);
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
  for (int q = 0; q < kBlockQ; ++q) {
    const double largest = static_cast<double>(state.largest[q]);
    const bool hidden = q >= rows || (formula.plain && state.largest[q] == kLowest<Real>);
    const Real sum = hidden ? Real(0) : state.sum[q];
    // Not `sum > 0`: a NaN must reach the output.
    factor[q] = sum == 0 ? Real(0) : static_cast<Real>(dropout.factor()) / sum;
    if (sum == 0) {
      lse[q] = -std::numeric_limits<Real>::infinity();
    } else if (formula.plain) {
      // The exponent of the largest score is 0 but for rounding.
      const double exponent = std::fma(largest - static_cast<double>(state.shift.base[q]),
                                       static_cast<double>(formula.log2_scale()),
                                       static_cast<double>(state.shift.offset[q]));
      lse[q] = static_cast<Real>(largest * static_cast<double>(formula.scale) - exponent * kLn2 +
                                 static_cast<double>(std::log(sum)));
    } else {
      lse[q] = state.largest[q] + std::log(sum);
    }
  }
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
