// Probabilities recomputed from the scores and lse of the forward pass.
#pragma once

#include "attention/cpu/head.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// What turns the scores of a block of queries back into probabilities,
// p = exp(score - shift) * weight, and p with its gradient into dS = p * (dP - delta).
template <class Real>
struct RowStatistics {
  alignas(64) Real shift[kBlockQ];   // lse; so large for a row without visible keys that p = 0
  alignas(64) Real weight[kBlockQ];  // 1, unless lse is too coarse: see refine()
  alignas(64) Real delta[kBlockQ];
  bool refined = false;  // weight is not 1

  bool dead(int q) const { return shift[q] == Real(0x1p100); }
};

// Beyond this |lse|, its rounding error shows in the probabilities: rows of large scores that come
// out equal, such as those hidden by adding the lowest number, would not even sum to 1.
constexpr double kCoarseLse = 1e4;

// shift, weight and "is there a row without visible keys?" from lse.
template <class Real>
inline bool load_lse(const HeadView& lse, int rows, RowStatistics<Real>& row, bool* coarse) {
  bool dead = false;
  *coarse = false;
  for (int q = 0; q < kBlockQ; ++q) {
    const Real value = q < rows ? *lse.row<const Real>(q) : -std::numeric_limits<Real>::infinity();
    const bool hidden = value == -std::numeric_limits<Real>::infinity();
    row.shift[q] = hidden ? Real(0x1p100) : value;
    row.weight[q] = 1;
    dead |= hidden && q < rows;
    *coarse |= !hidden && std::fabs(value) > Real(kCoarseLse);
  }
  row.refined = false;
  return dead;
}

// Probability of a score as apply_formula leaves it.
template <class E, bool kPlain>
FUSED_ATTN_INLINE Vec<typename E::Real> probability(Vec<typename E::Real> score,
                                                    Vec<typename E::Real> scale,
                                                    Vec<typename E::Real> shift) {
  const auto exponent = kPlain ? fma(score, scale, Vec<typename E::Real>::zero() - shift)
                               : clamp_exponent(score - shift);
  return exp<E::kPrecision>(exponent);
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
    Real* at = scores + c * kBlockQ + g * kLanes;
    const V score = V::load(at), shift = V::load(row.shift + g * kLanes);
    V p = formula.plain ? probability<E, true>(score, scale, shift)
                        : probability<E, false>(score, scale, shift);
    p = p * V::load(row.weight + g * kLanes);
    if (map.seen == Seen::kSome) p = select(lanes_of(map.visible, c, g), p, V::zero());
    p.store(at);
  });
}

// Where lse is too coarse: the largest score and the sum of exponentials of the selected queries
// again, from the scores.
template <class E>
inline void refine(HeadScores<E>& tile, KeyRange keys, RowStatistics<typename E::Real>& row) {
  using Real = typename E::Real;
  alignas(64) Real largest[kBlockQ];
  alignas(64) Real total[kBlockQ] = {};
  for (Real& x : largest) x = std::numeric_limits<Real>::lowest();
  tile.for_each_tile(keys, kBlockK, [&] { tile.compute(largest); });
  const Real scale = tile.formula.plain ? tile.formula.scale : Real(1);
  for (int q = 0; q < kBlockQ; ++q) {
    if (!row.dead(q)) row.shift[q] = largest[q] * scale;
  }
  tile.for_each_tile(keys, kBlockK, [&] {
    tile.compute(largest);
    probability_tile<E>(tile.map, tile.formula, row, tile.scores);
    for_each_visible(tile.map, [&](int c, int g) {
      const auto p = Vec<Real>::load(tile.scores + c * kBlockQ + g * kLanes);
      (Vec<Real>::load(total + g * kLanes) + p).store(total + g * kLanes);
    });
  });
  for (int q = 0; q < kBlockQ; ++q) row.weight[q] = total[q] == 0 ? Real(0) : 1 / total[q];
  row.refined = true;
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
