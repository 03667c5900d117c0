// From q . k to the score: softcap, ALiBi, bias and masks on an accumulator fragment, and the
// dropout of probabilities. One function per operand, each a loop over the fragment: uniform
// conditions stay outside the loops.
#pragma once

#include "attention/sm90/padding.h"
#include "attention/sm90/tile.h"
#include "cuda/philox.h"

namespace fused_attn::attention {

constexpr float kLog2E = 1.44269504088896f;

// The place of a fragment in the score matrix of one head. Rows of the fragment are queries, or,
// transposed, keys.
template <bool kTransposed>
struct ScoreAt {
  int batch, head;
  int query, key;  // of register 0
  // Transposed: the queries [lowest_query + 8 r, end_query[r]) see the key of the fragment's row r.
  int lowest_query = 0, end_query[2] = {0, 0};

  FUSED_ATTN_DEVICE int query_of(int i) const { return query + query_offset(i); }
  FUSED_ATTN_DEVICE int key_of(int i) const { return key + (kTransposed ? down(i) : along(i)); }
  // Is there anything for operands of single scores to change in register i? Elsewhere there may
  // be no memory behind them.
  FUSED_ATTN_DEVICE bool exists(int i, const Band& band) const {
    const int row = i >> 1 & 1;
    if (kTransposed) {
      return query_of(i) >= lowest_query + 8 * row && query_of(i) < end_query[row];
    }
    return query_of(i) < band.seqlen_q() && key_of(i) < band.end(query_of(i));
  }

  // Which of the two queries of registers 4 j to 4 j + 3 is that of 4 j + e?
  static FUSED_ATTN_DEVICE constexpr int which_query(int e) { return kTransposed ? e & 1 : e >> 1; }

  // How far the query of register i is from that of register 0.
  static FUSED_ATTN_DEVICE constexpr int query_offset(int i) {
    return kTransposed ? along(i) : down(i);
  }

  static FUSED_ATTN_DEVICE constexpr int down(int i) { return (i & 2) * 4; }
  static FUSED_ATTN_DEVICE constexpr int along(int i) { return (i >> 2) * 8 + (i & 1); }
};

// For those who do not want the derivative of the softcap.
struct NoSlope {
  FUSED_ATTN_DEVICE void set(int, float) {}
};

// The derivative of the softcap by element.
template <int kCount>
struct Slope {
  float value[kCount];
  FUSED_ATTN_DEVICE void set(int i, float derivative) { value[i] = derivative; }
};

// -inf hides even a key whose score is no number. A finite bias, however large, hides nothing.
FUSED_ATTN_DEVICE float biased(float score, float bias) {
  constexpr float kHighest = 3.4028234e38f;
  if (bias == -device::infinity()) return bias;
  const float sum = score + bias;
  if (sum < -kHighest) return -kHighest;
  return sum > kHighest ? kHighest : sum;
}

// score = scale * q . k, then softcap, ALiBi and bias. Bias is read where the band lets see only:
// elsewhere there may be none.
template <class Element, int kCount, class At, class SlopeOf>
FUSED_ATTN_DEVICE void modify_scores(float (&s)[kCount], const DeviceProblem& p, const At& at,
                                     const Band& band, const Sequence& sequence,
                                     SlopeOf& slope_of) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) s[i] *= p.scale;
  if (p.softcap > 0.0f) {
    // tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's own tanh has 11 bits only.
    const float factor = 2.0f * kLog2E / p.softcap;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      const float t = 1.0f - 2.0f / (device::exp2_fast(s[i] * factor) + 1.0f);
      s[i] = p.softcap * t;
      slope_of.set(i, 1.0f - t * t);
    }
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = p.alibi_slopes[at.head];
    const int shift = sequence.seqlen_k - sequence.seqlen_q;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      const int distance = at.query_of(i) + shift - at.key_of(i);
      s[i] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
  }
  if (p.bias.data != nullptr) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      if (!at.exists(i, band)) continue;
      const float bias = read_bias<Element>(p, at.batch, at.head, at.query_of(i), at.key_of(i));
      s[i] = biased(s[i], bias);
    }
  }
}

// -inf in a row of the fragment but for the columns [begin, end), counted from that of register 0.
template <int kCount>
FUSED_ATTN_DEVICE void hide_outside(float (&s)[kCount], int row, int begin, int end) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    const int column = (i >> 2) * 8 + (i & 1);
    if ((i >> 1 & 1) == row && (column < begin || column >= end)) s[i] = -device::infinity();
  }
}

// -inf where the band hides a key.
template <int kCount>
FUSED_ATTN_DEVICE void hide_by_band(float (&s)[kCount], const ScoreAt<false>& at,
                                    const Band& band) {
  FUSED_ATTN_UNROLL_LOOP
  for (int row = 0; row < 2; ++row) {
    const int query = at.query + 8 * row;
    hide_outside(s, row, band.first(query) - at.key, band.end(query) - at.key);
  }
}
template <int kCount>
FUSED_ATTN_DEVICE void hide_by_band(float (&s)[kCount], const ScoreAt<true>& at) {
  FUSED_ATTN_UNROLL_LOOP
  for (int row = 0; row < 2; ++row) {
    hide_outside(s, row, at.lowest_query + 8 * row - at.query, at.end_query[row] - at.query);
  }
}

// -inf where the padding hides a key of key tile `tile`; `column` is that of register 0.
template <int kCount, class Padding>
FUSED_ATTN_DEVICE void hide_by_padding(float (&s)[kCount], const Padding& padding, int tile,
                                       int column) {
  if (!padding.present()) return;
  FUSED_ATTN_UNROLL_LOOP
  for (int w = 0; w < kCount / 16; ++w) {
    const uint32_t bits = padding.word(tile, w) >> column;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 16 * w; i < 16 * w + 16; ++i) {
      if ((bits >> ((i >> 2) % 4 * 8 + (i & 1)) & 1) == 0) s[i] = -device::infinity();
    }
  }
}

// -inf where the bool mask hides a key.
template <int kCount, class At>
FUSED_ATTN_DEVICE void hide_by_mask(float (&s)[kCount], const DeviceProblem& p, const At& at,
                                    const Band& band) {
  if (p.mask.data == nullptr) return;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    if (!at.exists(i, band)) continue;
    const uint8_t* row = p.mask.at<uint8_t>(at.batch, at.head, at.query_of(i));
    if (row[at.key_of(i) * p.mask.stride[3]] == 0) s[i] = -device::infinity();
  }
}

// Dropout: key j of query i of head n draws word j & 3 of the Philox block (j >> 2, i, n, offset).
// `kMark`: what is dropped becomes negative, which a backward can still read; else 0.
template <bool kMark>
FUSED_ATTN_DEVICE void drop_below(float& probability, uint32_t word, uint32_t keep_from) {
  if (word < keep_from) probability = kMark ? -probability : 0.0f;
}

// Two neighbouring threads need the same two blocks, of rows i and i + 8: each draws one of them
// and hands over the half that the other needs.
template <bool kMark, int kCount>
FUSED_ATTN_DEVICE void drop(float (&probability)[kCount], const DeviceProblem& p,
                            const ScoreAt<false>& at) {
  const device::Philox philox(p.rng[0], p.rng[1]);
  const auto n = static_cast<uint32_t>(at.batch * p.num_heads + at.head);
  const bool odd = (at.key & 2) != 0;
  FUSED_ATTN_UNROLL_LOOP
  for (int j = 0; j < kCount / 4; ++j) {
    uint32_t word[4];
    philox.draw(static_cast<uint32_t>(at.key + 8 * j) >> 2,
                static_cast<uint32_t>(at.query + (odd ? 8 : 0)), n, word);
    const uint32_t theirs[2] = {device::shuffle_xor(odd ? word[0] : word[2], 1),
                                device::shuffle_xor(odd ? word[1] : word[3], 1)};
    FUSED_ATTN_UNROLL_LOOP
    for (int c = 0; c < 2; ++c) {
      drop_below<kMark>(probability[4 * j + c], odd ? theirs[c] : word[c], p.keep_from);
      drop_below<kMark>(probability[4 * j + 2 + c], odd ? word[2 + c] : theirs[c], p.keep_from);
    }
  }
}

// Transposed, four threads a row apart need the same four blocks (two queries, two groups of keys)
// and a word of each: each draws one block, then they transpose the 4 x 4 words among them.
template <bool kMark, int kCount>
FUSED_ATTN_DEVICE void drop(float (&probability)[kCount], const DeviceProblem& p,
                            const ScoreAt<true>& at) {
  const device::Philox philox(p.rng[0], p.rng[1]);
  const auto n = static_cast<uint32_t>(at.batch * p.num_heads + at.head);
  const int mine = at.key & 3;
  FUSED_ATTN_UNROLL_LOOP
  for (int j = 0; j < kCount / 4; ++j) {
    uint32_t word[4];
    philox.draw(static_cast<uint32_t>(at.key + (mine & 2) * 4) >> 2,
                static_cast<uint32_t>(at.query + 8 * j + (mine & 1)), n, word);
    FUSED_ATTN_UNROLL_LOOP
    for (int bit = 2; bit > 0; bit >>= 1) {
      const bool upper = (mine & bit) != 0;
      FUSED_ATTN_UNROLL_LOOP
      for (int w = 0; w < 4; ++w) {
        if ((w & bit) != 0) continue;
        const uint32_t got = device::shuffle_xor(upper ? word[w] : word[w | bit], 4 * bit);
        word[w] = upper ? got : word[w];
        word[w | bit] = upper ? word[w | bit] : got;
      }
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int c = 0; c < 4; ++c) drop_below<kMark>(probability[4 * j + c], word[c], p.keep_from);
  }
}

}  // namespace fused_attn::attention
