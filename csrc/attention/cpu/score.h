// From q . k to the final score: scale, softcap, ALiBi, bias and masks on a transposed tile
// scores[key][query].
#pragma once

#include <limits>

#include "attention/cpu/pack.h"
#include "attention/functions.h"
#include "cpu/philox.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

template <class Real>
struct ScoreFormula {
  Real scale;
  Real softcap;
  bool changed;  // by a function, which scales
  // Nothing but a moderate positive scale: the tile keeps q . k and the exponential scales it.
  bool plain;

  explicit ScoreFormula(const Params& p)
      : scale(static_cast<Real>(p.scale)),
        softcap(static_cast<Real>(p.softcap)),
        changed(p.functions != nullptr && p.functions->score),
        plain(p.softcap <= 0 && p.alibi_slopes == nullptr && p.bias.data == nullptr && !changed &&
              p.scale >= 1e-3 && p.scale <= 1e3) {}

  // What a score in the tile is multiplied with to be a power of 2.
  Real log2_scale() const { return static_cast<Real>((plain ? double(scale) : 1.0) * kLog2e); }
};

// Below all scores but -inf.
template <class Real>
constexpr Real kLowest = std::numeric_limits<Real>::lowest();

// The score of a hidden key. In plain tiles it is finite, so that the exponential needs no clamp.
template <class Real>
constexpr Real hidden_score(bool plain) {
  return plain ? kLowest<Real> : -std::numeric_limits<Real>::infinity();
}

// Exponents never need to be smaller than this, which gives 0 in either precision; it keeps -inf
// and overflown differences out of exp and exp2.
template <class Real>
FUSED_ATTN_INLINE Vec<Real> clamp_exponent(Vec<Real> x) {
  return max(Vec<Real>::set1(Real(-2000)), x);
}

// The same for exponents to base e whose exponential would be a subnormal number: an operation on
// one takes some processors as long as a hundred others, and under ALiBi many keys lie so far away.
template <class Real>
FUSED_ATTN_INLINE Vec<Real> clamp_natural(Vec<Real> x) {
  const auto least = Vec<Real>::set1(Real(sizeof(Real) == 4 ? -87 : -708));
  return select(greater(least, x), Vec<Real>::set1(Real(-2000)), x);
}

// One tile: queries [i, i + rows), keys [j, j + map.keys) of one head.
struct ScoreTile {
  const Params& p;
  const Sequence& sequence;
  int64_t head;
  int64_t i;
  int rows;
  int64_t j;
  const TileMap& map;
};

// Calls call(key, group) for every visible 16 queries of a tile, group by group.
template <class Call>
FUSED_ATTN_INLINE void for_each_visible(const TileMap& map, const Call& call) {
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      for (int c = segment.begin; c < segment.end; ++c) call(c, g);
    }
  }
}

FUSED_ATTN_INLINE Mask lanes_of(const uint64_t* words, int key, int group) {
  return static_cast<Mask>(words[key] >> (group * kLanes));
}

// scale, softcap and ALiBi; `slope` (may be null) receives the derivative of the softcap.
template <class Real>
inline void shape_scores(const ScoreTile& t, const ScoreFormula<Real>& formula, Real* scores,
                         Real* slope) {
  using V = Vec<Real>;
  const V one = V::set1(1);
  const V scale = V::set1(formula.softcap > 0 ? formula.scale / formula.softcap : formula.scale);
  const V softcap = V::set1(formula.softcap);
  const float* slopes = t.p.alibi_slopes;
  const V alibi = V::set1(slopes == nullptr ? Real(0) : static_cast<Real>(slopes[t.head]));
  const int64_t shift = t.sequence.seqlen_k - t.sequence.seqlen_q;
  alignas(64) Real distance[kBlockQ];  // of each query to key 0
  for (int q = 0; q < kBlockQ; ++q) distance[q] = static_cast<Real>(t.i + q + shift);
  for_each_visible(t.map, [&](int c, int g) {
    Real* score = scores + c * kStrideQ + g * kLanes;
    V s = V::load(score) * scale;
    if (formula.softcap > 0) {
      const V bounded = tanh(s);
      if (slope != nullptr) {
        (one - bounded * bounded).store(slope + c * kStrideQ + g * kLanes);
      }
      s = softcap * bounded;
    }
    if (slopes != nullptr) {
      const V apart = V::load(distance + g * kLanes) - V::set1(static_cast<Real>(t.j + c));
      s = s - alibi * abs(apart);
    }
    s.store(score);
  });
}

// 16 keys from `key` on of 16 queries from `query` on, transposed: block[key][query].
template <class Real, class T>
FUSED_ATTN_INLINE void load_bias_block(const T* corner, int64_t stride_q, int rows, int query,
                                       int key, int width, Vec<Real> (&block)[kLanes]) {
  for (int r = 0; r < kLanes; ++r) {
    block[r] = query + r < rows ? load_as<Real>(corner + (query + r) * stride_q + key, width)
                                : Vec<Real>::zero();
  }
  transpose(block);
}

// The bias of a tile, transposed: to[key][query].
template <class Real>
inline void load_bias(const ScoreTile& t, const View4& view, Real* to) {
  with_bias_dtype<Real>(view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* corner = at<const T>(view, t.sequence.batch, t.head, t.i, t.j);
    const int64_t stride_q = view.stride[2], stride_k = view.stride[3];
    const int groups = static_cast<int>(ceil_div(t.rows, kLanes));
    if (stride_q == 0) {
      for (int c = 0; c < t.map.keys; ++c) {
        const auto value = Vec<Real>::set1(to_real<Real>(corner[c * stride_k]));
        for (int g = 0; g < groups; ++g) value.store(to + c * kStrideQ + g * kLanes);
      }
      return;
    }
    if (stride_k != 1) {
      for (int c = 0; c < t.map.keys; ++c) {
        for (int q = 0; q < groups * kLanes; ++q) {
          to[c * kStrideQ + q] =
              q < t.rows ? to_real<Real>(corner[q * stride_q + c * stride_k]) : Real(0);
        }
      }
      return;
    }
    for (int q = 0; q < t.rows; q += kLanes) {
      for (int c = 0; c < t.map.keys; c += kLanes) {
        const int width = smaller(t.map.keys - c, kLanes);
        Vec<Real> block[kLanes];
        load_bias_block(corner, stride_q, t.rows, q, c, width, block);
        for (int k = 0; k < width; ++k) block[k].store(to + (c + k) * kStrideQ + q);
      }
    }
  });
}

// score * scale + bias where visible, and the largest score of each query.
template <class Real, bool kPlain, bool kBias, bool kMask>
inline void finish_scores(const TileMap& map, Real scale, const Real* bias, Real* scores,
                          Real* largest) {
  using V = Vec<Real>;
  const V hidden = V::set1(hidden_score<Real>(kPlain));
  const V factor = V::set1(scale);
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      V most = V::load(largest + g * kLanes);
      for (int c = segment.begin; c < segment.end; ++c) {
        const int64_t offset = c * kStrideQ + g * kLanes;
        V score = V::load(scores + offset);
        if constexpr (!kPlain && kBias) score = fma(score, factor, V::load(bias + offset));
        if constexpr (!kPlain && !kBias) score = score * factor;
        if constexpr (kMask) score = select(lanes_of(map.visible, c, g), score, hidden);
        if constexpr (!kPlain || kMask) score.store(scores + offset);
        most = max(most, score);
      }
      most.store(largest + g * kLanes);
    }
  }
}

// The same from a bias whose keys lie side by side: it is added as it is read, and kept nowhere.
template <class Real, bool kMask>
inline void finish_with_bias(const ScoreTile& t, const View4& view, Real scale, Real* scores,
                             Real* largest) {
  using V = Vec<Real>;
  const V hidden = V::set1(hidden_score<Real>(false));
  const V factor = V::set1(scale);
  with_bias_dtype<Real>(view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* corner = at<const T>(view, t.sequence.batch, t.head, t.i, t.j);
    for (int s = 0; s < t.map.num_segments; ++s) {
      const Segment& segment = t.map.segments[s];
      for (int g = segment.group_begin; g < segment.group_end; ++g) {
        V most = V::load(largest + g * kLanes);
        for (int c = segment.begin; c < segment.end; c += kLanes) {
          const int width = smaller(segment.end - c, kLanes);
          V block[kLanes];
          load_bias_block(corner, view.stride[2], t.rows, g * kLanes, c, width, block);
          for (int k = 0; k < width; ++k) {
            Real* at = scores + (c + k) * kStrideQ + g * kLanes;
            V score = fma(V::load(at), factor, block[k]);
            if constexpr (kMask) score = select(lanes_of(t.map.visible, c + k, g), score, hidden);
            score.store(at);
            most = max(most, score);
          }
        }
        most.store(largest + g * kLanes);
      }
    }
  });
}

// Turns q . k into the final scores and raises `largest` to the largest one of each query. Plain
// tiles keep q . k, with hidden_score where hidden.
template <class Real>
inline void apply_formula(const ScoreTile& t, const ScoreFormula<Real>& formula, Real* scores,
                          Real* bias, Real* slope, Real* largest) {
  const bool mask = t.map.seen == Seen::kSome;
  if (formula.plain) {
    return mask ? finish_scores<Real, true, false, true>(t.map, 1, nullptr, scores, largest)
                : finish_scores<Real, true, false, false>(t.map, 1, nullptr, scores, largest);
  }
  Real scale = formula.changed ? Real(1) : formula.scale;
  if (formula.softcap > 0 || t.p.alibi_slopes != nullptr) {
    shape_scores(t, formula, scores, slope);
    scale = 1;
  }
  if (t.p.bias.data != nullptr && t.p.bias.stride[2] != 0 && t.p.bias.stride[3] == 1) {
    return mask ? finish_with_bias<Real, true>(t, t.p.bias, scale, scores, largest)
                : finish_with_bias<Real, false>(t, t.p.bias, scale, scores, largest);
  }
  if (t.p.bias.data != nullptr) {
    load_bias(t, t.p.bias, bias);
    return mask ? finish_scores<Real, false, true, true>(t.map, scale, bias, scores, largest)
                : finish_scores<Real, false, true, false>(t.map, scale, bias, scores, largest);
  }
  return mask ? finish_scores<Real, false, false, true>(t.map, scale, nullptr, scores, largest)
              : finish_scores<Real, false, false, false>(t.map, scale, nullptr, scores, largest);
}

// Dropout: which probabilities of a tile survive.
class Dropout {
 public:
  explicit Dropout(const Params& p)
      : active_(p.rng != nullptr && p.dropout_p > 0),
        threshold_(active_ ? static_cast<uint64_t>(p.dropout_p * 0x1p32) : 0),
        philox_(active_ ? p.rng[0] : 0, active_ ? p.rng[1] : 0),
        factor_(!active_          ? 1
                : p.dropout_p < 1 ? 1 / (1 - p.dropout_p)
                                  : 0) {}

  bool active() const { return active_; }
  double factor() const { return factor_; }  // of what survives

  // Sets keep[key] to the surviving queries.
  void draw(const ScoreTile& t, uint64_t* keep) const {
    for (int c = 0; c < t.map.keys; ++c) keep[c] = 0;
    if (threshold_ >> 32 != 0) return;
    const VecU threshold = VecU::set1(static_cast<uint32_t>(threshold_));
    const uint32_t head = static_cast<uint32_t>(t.sequence.batch * t.p.num_heads + t.head);
    const int64_t end = t.j + t.map.keys;
    for (int q = 0; q < t.rows; q += kLanes) {
      alignas(64) uint32_t position[kLanes];
      for (int l = 0; l < kLanes; ++l) position[l] = static_cast<uint32_t>(t.i + q + l);
      for (int64_t block = t.j / 4; block * 4 < end; ++block) {
        VecU words[4];
        philox_.draw(static_cast<uint32_t>(block), VecU::load(position), head, words);
        for (int w = 0; w < 4; ++w) {
          const int64_t c = 4 * block + w - t.j;
          if (c < 0 || c >= t.map.keys) continue;
          keep[c] |= uint64_t{not_below(words[w], threshold)} << q;
        }
      }
    }
  }

 private:
  bool active_;
  uint64_t threshold_;
  Philox philox_;
  double factor_;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
