// The element-wise part of the backward pass: from the scores and dP = dout V^T of a tile to its
// probabilities and to dS, the gradient of the scores.
#pragma once

#include "attention/cpu/probability.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// Tiles of one step, [key][query] but for the pairs.
template <class E>
struct GradientTiles {
  using Real = typename E::Real;
  Real* scores;
  Real* dp;              // dout V^T
  const Real* dweights;  // gradient of the returned weights; may be null
  const Real* slope;     // derivative of the softcap; may be null
  const uint64_t* keep;  // dropout; may be null
  Real drop_factor;
  // Where units are numbers, these two take the place of scores and dp.
  typename E::Element* p;      // after dropout
  typename E::Element* ds;     // of q . k, without `scale`
  typename E::Unit* ds_pairs;  // the same, [key unit][query]; unused where units are numbers
  Real* ds_full;               // of the final score, for dbias; may be null
};

// kExtras: anything that may be null above is there, or the row statistics are exact.
template <class E, bool kPlain, bool kMask, bool kExtras>
class GradientTile {
  using Real = typename E::Real;
  using V = Vec<Real>;

 public:
  GradientTile(const TileMap& map, Real scale, const RowStatistics<Real>& row,
               const GradientTiles<E>& tiles)
      : map_(map), scale_(scale), row_(row), t_(tiles) {}

  void run() const {
    for (int s = 0; s < map_.num_segments; ++s) {
      const Segment& segment = map_.segments[s];
      for (int g = segment.group_begin; g < segment.group_end; ++g) run_group(segment, g);
    }
  }

 private:
  FUSED_ATTN_INLINE void run_group(const Segment& segment, int g) const {
    const V shift = V::load(row_.shift + g * kLanes), delta = V::load(row_.delta + g * kLanes);
    const V weight = V::load(row_.weight + g * kLanes), scale = V::set1(scale_);
    const V base = kExtras ? V::load(row_.base + g * kLanes) : V::zero();
    Real *const scores = t_.scores, *const dps = t_.dp;
    auto gradient = [&](int c) {
      const int64_t at = c * kStrideQ + g * kLanes;
      V score = V::load(scores + at);
      if (kExtras && row_.exact) score = score - base;
      V p = probability<E, kPlain>(score, scale, shift);
      V dp = V::load(dps + at);
      V dropped = p;
      if constexpr (kExtras) {
        p = dropped = p * weight;
        if (t_.dweights != nullptr) dp = dp + V::load(t_.dweights + at);
        if (t_.keep != nullptr) {
          const V factor = select(lanes_of(t_.keep, c, g), V::set1(t_.drop_factor), V::zero());
          dropped = p * factor;
          dp = dp * factor;
        }
      }
      V ds = p * (dp - delta);
      if (kMask && (!kExtras || map_.seen == Seen::kSome)) {
        const Mask visible = lanes_of(map_.visible, c, g);
        dropped = select(visible, dropped, V::zero());
        ds = select(visible, ds, V::zero());
      }
      if constexpr (kExtras) {
        if (t_.ds_full != nullptr) ds.store(t_.ds_full + at);
        if (t_.slope != nullptr) ds = ds * V::load(t_.slope + at);
      }
      if constexpr (E::kPair == 1) {
        store(scores + at, dropped);
        store(dps + at, ds);
      } else {
        store(t_.p + at, dropped);
        store(t_.ds + at, ds);
      }
      return ds;
    };
    if constexpr (E::kPair == 1) {
      for (int c = segment.begin; c < segment.end; ++c) gradient(c);
    } else {
      for (int c = segment.begin; c < segment.end; c += 2) {
        const V even = gradient(c);
        const V odd = c + 1 < segment.end ? gradient(c + 1) : V::zero();
        pack_pairs(even, odd).store(t_.ds_pairs + c / 2 * kStrideQ + g * kLanes);
      }
    }
  }

  const TileMap& map_;
  const Real scale_;
  const RowStatistics<Real>& row_;
  const GradientTiles<E>& t_;
};

template <class E>
inline void gradient_tile(const TileMap& map, const ScoreFormula<typename E::Real>& formula,
                          const RowStatistics<typename E::Real>& row,
                          const GradientTiles<E>& tiles) {
  const bool mask = map.seen == Seen::kSome;
  const bool extras = tiles.dweights != nullptr || tiles.slope != nullptr ||
                      tiles.keep != nullptr || tiles.ds_full != nullptr || row.exact;
  const auto scale = formula.scale;
  if (formula.plain && !extras) {
    return mask ? GradientTile<E, true, true, false>(map, scale, row, tiles).run()
                : GradientTile<E, true, false, false>(map, scale, row, tiles).run();
  }
  if (formula.plain) return GradientTile<E, true, true, true>(map, scale, row, tiles).run();
  GradientTile<E, false, true, true>(map, scale, row, tiles).run();
}

// Adds the gradient of a tile's final scores, [key][query] and 0 where hidden, to dbias: one number
// of dbias receives all that its strides of 0 spread it over.
template <class Real>
inline void add_to_bias_gradient(const ScoreTile& t, const View4& view, const Real* ds) {
  using V = Vec<Real>;
  Real* corner = at<Real>(view, t.sequence.batch, t.head, t.i, t.j);
  const int64_t stride_q = view.stride[2], stride_k = view.stride[3];
  const int groups = static_cast<int>(ceil_div(t.rows, kLanes));
  if (stride_q == 0 && stride_k == 0) {  // one addition a tile keeps the error of long sums small
    V total[kGroups];
    for (V& x : total) x = V::zero();
    for (int c = 0; c < t.map.keys; ++c) {
      for (int g = 0; g < groups; ++g) {
        total[g] = total[g] + V::load(ds + c * kStrideQ + g * kLanes);
      }
    }
    *corner += sum((total[0] + total[1]) + (total[2] + total[3]));
    return;
  }
  if (stride_q == 0) {
    for (int c = 0; c < t.map.keys; ++c) {
      V total = V::load(ds + c * kStrideQ);
      for (int g = 1; g < groups; ++g) total = total + V::load(ds + c * kStrideQ + g * kLanes);
      corner[c * stride_k] += sum(total);
    }
    return;
  }
  for (int q = 0; q < t.rows; q += kLanes) {
    const int count = smaller(t.rows - q, kLanes);
    if (stride_k == 0) {
      V total = V::zero();
      for (int c = 0; c < t.map.keys; ++c) total = total + V::load(ds + c * kStrideQ + q);
      alignas(64) Real lanes[kLanes];
      total.store(lanes);
      for (int r = 0; r < count; ++r) corner[(q + r) * stride_q] += lanes[r];
      continue;
    }
    for (int c = 0; c < t.map.keys; c += kLanes) {
      const int width = smaller(t.map.keys - c, kLanes);
      V block[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        block[k] = k < width ? V::load(ds + (c + k) * kStrideQ + q) : V::zero();
      }
      transpose(block);
      for (int r = 0; r < count; ++r) {
        Real* to = corner + (q + r) * stride_q + c * stride_k;
        if (stride_k == 1) {
          (V::load(to, width) + block[r]).store(to, width);
          continue;
        }
        alignas(64) Real lanes[kLanes];
        block[r].store(lanes);
        for (int k = 0; k < width; ++k) to[k * stride_k] += lanes[k];
      }
    }
  }
}

// sum over d of a[i][d] * b[i][d]
template <class Real>
inline Real dot_rows(const HeadView& a, const HeadView& b, int64_t i) {
  Real result = 0;
  with_dtype<Real>(a.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* x = a.row<const T>(i);
    const T* y = b.row<const T>(i);
    if (a.stride_column() == 1 && b.stride_column() == 1) {
      Vec<Real> total = Vec<Real>::zero();
      for (int64_t d = 0; d < a.columns; d += kLanes) {
        const int n = static_cast<int>(smaller<int64_t>(a.columns - d, kLanes));
        total = fma(load_as<Real>(x + d, n), load_as<Real>(y + d, n), total);
      }
      result = sum(total);
    } else {
      for (int64_t d = 0; d < a.columns; ++d) {
        result += to_real<Real>(x[d * a.stride_column()]) * to_real<Real>(y[d * b.stride_column()]);
      }
    }
  });
  return result;
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
