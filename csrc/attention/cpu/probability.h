// Probabilities recomputed from the scores and lse of the forward pass.
#pragma once

#include "attention/cpu/head.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// What turns the scores of a block of queries back into probabilities,
// p = exp(scale * (score - base) - shift) * weight, and p with its gradient into
// dS = p * (dP - delta).
template <class Real>
struct RowStatistics {
  alignas(64) Real base[kBlockQ];    // 0 unless exact
  alignas(64) Real shift[kBlockQ];   // lse; so large for a row without visible keys that p = 0
  alignas(64) Real weight[kBlockQ];  // 1 unless exact
  alignas(64) Real delta[kBlockQ];
  uint64_t dead_rows = 0;  // bit = query
  bool exact = false;      // of recompute_statistics()

  bool dead(int q) const { return dead_rows >> q & 1; }
};

// Beyond this |lse|, its rounding error shows in the probabilities: rows of large scores that come
// out equal, such as those hidden by adding the lowest number, would not even sum to 1.
constexpr double kMaxLse = 512;

// The statistics that lse gives; is one of them too large for that?
template <class Real>
inline bool load_lse(const HeadView& lse, int rows, RowStatistics<Real>& row) {
  bool too_large = false;
  row.dead_rows = 0;
  row.exact = false;
  for (int q = 0; q < kBlockQ; ++q) {
    const Real value = q < rows ? *lse.row<const Real>(q) : -std::numeric_limits<Real>::infinity();
    const bool hidden = value == -std::numeric_limits<Real>::infinity();
    row.dead_rows |= uint64_t{hidden} << q;
    row.base[q] = 0;
    row.shift[q] = hidden ? Real(0x1p100) : value;
    row.weight[q] = 1;
    too_large |= !hidden && std::fabs(value) > Real(kMaxLse);
  }
  return too_large;
}

// Probability of a score as apply_formula leaves it, less its base.
template <class E, bool kPlain>
FUSED_ATTN_INLINE Vec<typename E::Real> probability(Vec<typename E::Real> score,
                                                    Vec<typename E::Real> scale,
                                                    Vec<typename E::Real> shift) {
  const auto exponent =
      kPlain ? fma(score, scale, Vec<typename E::Real>::zero() - shift) : score - shift;
  return exp<E::kPrecision>(clamp_natural(exponent));
}

// The probabilities of a tile in place of its scores, 0 where hidden (outside of the segments,
// too).
template <class E>
inline void probability_tile(const TileMap& map, const ScoreFormula<typename E::Real>& formula,
                             const RowStatistics<typename E::Real>& row, typename E::Real* scores) {
  using Real = typename E::Real;
  using V = Vec<Real>;
  const V scale = V::set1(formula.scale);
  for_each_visible(map, [&](int c, int g) {
    Real* at = scores + c * kStrideQ + g * kLanes;
    const V score = V::load(at) - V::load(row.base + g * kLanes);
    const V shift = V::load(row.shift + g * kLanes);
    V p = formula.plain ? probability<E, true>(score, scale, shift)
                        : probability<E, false>(score, scale, shift);
    p = p * V::load(row.weight + g * kLanes);
    if (map.seen == Seen::kSome) p = select(lanes_of(map.visible, c, g), p, V::zero());
    p.store(at);
  });
}

// The row statistics of the selected queries again, from the scores: the largest score and the sum
// of exponentials, where lse has lost too many bits.
template <class E>
inline void recompute_statistics(HeadScores<E>& tile, KeyRange keys,
                                 RowStatistics<typename E::Real>& row) {
  using Real = typename E::Real;
  alignas(64) Real largest[kBlockQ];
  alignas(64) Real total[kBlockQ] = {};
  for (Real& x : largest) x = kLowest<Real>;
  tile.for_each_tile(keys, kBlockK, [&] { tile.compute(largest); });
  for (int q = 0; q < kBlockQ; ++q) {
    if (row.dead(q)) continue;
    row.base[q] = largest[q];
    row.shift[q] = 0;
  }
  tile.for_each_tile(keys, kBlockK, [&] {
    tile.compute(largest);
    probability_tile<E>(tile.map, tile.formula, row, tile.scores);
    for_each_visible(tile.map, [&](int c, int g) {
      const auto p = Vec<Real>::load(tile.scores + c * kStrideQ + g * kLanes);
      (Vec<Real>::load(total + g * kLanes) + p).store(total + g * kLanes);
    });
  });
  for (int q = 0; q < kBlockQ; ++q) row.weight[q] = total[q] == 0 ? Real(0) : 1 / total[q];
  row.exact = true;
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
