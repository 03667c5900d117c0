// What the kernels of the attention backward share.
//
// dkdv holds a block of keys and walks over queries. It can add up dq as well, in float32 in global
// memory (dq_sum.h): five products, and sums whose order nobody promises. Or dq has a kernel
// of its own, which holds a block of queries and walks over keys: seven products, for both
// recompute the probabilities from lse, but deterministic. fused_attn/ops/attention/cuda.py
// chooses.
//
//   p = exp(score - lse)              delta = rowsum(dout * out) - dlse
//   ds = p * (keep * (dout v^T) - delta)
//   dv = (keep * p)^T dout, dq = scale * ds k, dk = scale * ds^T q, dbias = ds
#pragma once

#include "attention/sm90/consumer.h"

namespace fused_attn::attention {

struct BackwardProblem : DeviceProblem {
  float* delta;                 // like lse2
  DeviceView result_out, dout;  // for delta
  const float* forward_lse;
  int64_t forward_lse_stride[3];
  const float* dlse;  // may be null
  int64_t dlse_stride[3];
  float* dq_sum;          // dq_sum.h; null = dq is not added up
  DeviceView dq, dk, dv;  // null = not wanted
  bool dq_by_tile, dk_by_tile, dv_by_tile;
  float* dbias;  // null = not wanted
  int64_t dbias_stride[4];
  bool dbias_shared;  // several (batch, head) add to an element
};

// Beyond this |lse| its rounding shows in the probabilities.
constexpr float kMaxLse = 5000.0f;

// p = 2^(scale_log2 * score - lse2)
FUSED_ATTN_DEVICE float probability(float score, float scale_log2, float lse2) {
  return device::exp2_fast(device::multiply_add(score, scale_log2, -lse2));
}

// Takes the base of its row off each score. No score is above its base, but for rounding.
// `base(i)`: that of register i.
template <int kCount, class Base>
FUSED_ATTN_DEVICE void subtract_base(float (&scores)[kCount], const Base& base) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    const float from = base(i);
    const float apart = scores[i] - from;
    scores[i] = from != 0.0f && apart > 0.0f ? 0.0f : apart;
  }
}

// ds of one element. `kDrops`: a dropped probability is marked by its sign. `kHides`: where p is 0,
// dp need not be a number, for it may be of a key that nobody sees.
template <bool kHides, bool kDrops>
FUSED_ATTN_DEVICE float score_gradient(float p, float dp, float delta, float keep_scale) {
  if (kDrops) {
    dp = p < 0.0f ? 0.0f : dp * keep_scale;
    p = p < 0.0f ? -p : p;
  }
  const float ds = p * (dp - delta);
  return kHides && p == 0.0f ? 0.0f : ds;
}

// dbias += ds, where the score exists.
template <class At, int kCount>
FUSED_ATTN_DEVICE void add_to_bias(const float (&ds)[kCount], const BackwardProblem& p,
                                   const At& at, const Band& band) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    if (!at.exists(i, band)) continue;
    float* to = p.dbias + at.batch * p.dbias_stride[0] + at.head * p.dbias_stride[1] +
                at.query_of(i) * p.dbias_stride[2] + at.key_of(i) * p.dbias_stride[3];
    if (p.dbias_shared) {
      device::atomic_add(to, ds[i]);
    } else {
      device::global_store(to, ds[i]);
    }
  }
}

// A statistic of the two queries that four registers in a row belong to.
struct QueryPair {
  float of[2];
};

// scores -> probabilities; what dropout drops is negative. `hide()` hides what band and padding
// hide; `lse2(i)` is that of the queries of register i and the next; `subtract()` takes the bases
// off, where the tile `has_base`.
template <class Config, bool kMasked, int kCount, class At, class Block, class SlopeOf, class Hide,
          class Lse2, class Subtract>
FUSED_ATTN_DEVICE void recompute_probabilities(float (&scores)[kCount], const BackwardProblem& p,
                                               const At& at, const Block& block, float scale_log2,
                                               SlopeOf& slope, const Hide& hide, const Lse2& lse2,
                                               bool has_base, const Subtract& subtract) {
  if constexpr (Config::kGeneral) {
    modify_scores<typename Config::Element>(scores, p, at, block.band, block.sequence, slope);
    hide_by_mask(scores, p, at, block.band);
  }
  if constexpr (kMasked) hide();
  if (has_base) subtract();
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; i += 4) {
    const QueryPair shift = lse2(i);
    FUSED_ATTN_UNROLL_LOOP
    for (int e = 0; e < 4; ++e) {
      scores[i + e] = probability(scores[i + e], scale_log2, shift.of[At::which_query(e)]);
    }
  }
  if constexpr (Config::kGeneral) {
    if (p.rng != nullptr) drop<true>(scores, p, at);
  }
}

// probabilities -> ds, packed. `kBias`: where dbias is wanted, this kernel adds it up.
template <class Config, bool kMasked, bool kBias, int kCount, int kPairs, class At, class Block,
          class SlopeOf, class Delta>
FUSED_ATTN_DEVICE void differentiate_scores(float (&scores)[kCount], const float (&dp)[kCount],
                                            uint32_t (&packed)[kPairs], const BackwardProblem& p,
                                            const At& at, const Block& block, const SlopeOf& slope,
                                            const Delta& delta) {
  const float keep_scale = Config::kGeneral ? p.keep_scale : 1.0f;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; i += 4) {
    const QueryPair of_query = delta(i);
    FUSED_ATTN_UNROLL_LOOP
    for (int e = 0; e < 4; ++e) {
      scores[i + e] = score_gradient<kMasked, Config::kGeneral>(
          scores[i + e], dp[i + e], of_query.of[At::which_query(e)], keep_scale);
    }
  }
  if constexpr (Config::kGeneral) {
    if (kBias && p.dbias != nullptr) add_to_bias(scores, p, at, block.band);
    if (p.softcap > 0.0f) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kCount; ++i) {
        // The slope of a hidden score need not be a number.
        scores[i] = scores[i] == 0.0f ? 0.0f : scores[i] * slope.value[i];
      }
    }
  }
  pack_pairs<typename Config::Element>(scores, packed);
}

}  // namespace fused_attn::attention
