// From q . k to the score: softcap, ALiBi, bias and masks on an accumulator fragment, and the
// dropout of probabilities. One function per operand, each a loop over the fragment: uniform
// conditions stay outside the loops.
#pragma once

#include "attention/cuda_padding.h"
#include "attention/cuda_tile.h"
#include "common/device/philox.h"

namespace fused_attn::attention {

constexpr float kLog2E = 1.44269504088896f;

// The place of a fragment in the score matrix of one head.
struct ScoreAt {
  int batch, head;
  int query;  // of registers 4 j and 4 j + 1; the others are 8 further
  int key;    // of register 0

  FUSED_ATTN_DEVICE int query_of(int i) const { return query + (i & 2) * 4; }
  FUSED_ATTN_DEVICE int key_of(int i) const { return key + (i >> 2) * 8 + (i & 1); }
};

// score = scale * q . k, then softcap, ALiBi and bias, in units of log2(e). Bias is read where
// `visible` only: elsewhere there may be none.
template <class Element, int kCount>
FUSED_ATTN_DEVICE void modify_scores(float (&s)[kCount], const DeviceProblem& p, const ScoreAt& at,
                                     const Band& band, const Sequence& sequence) {
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) s[i] *= p.scale;
  if (p.softcap > 0.0f) {
    // tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's own tanh has 11 bits only.
    const float factor = 2.0f * kLog2E / p.softcap;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kCount; ++i) {
      s[i] = p.softcap * (1.0f - 2.0f / (device::exp2_fast(s[i] * factor) + 1.0f));
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
      const int query = at.query_of(i), key = at.key_of(i);
      if (query >= sequence.seqlen_q || key >= band.end(query)) continue;
      const int64_t offset = key * p.bias.stride[3];
      s[i] += p.bias.wide ? p.bias.at<float>(at.batch, at.head, query)[offset]
                          : Element::widen(p.bias.at<uint16_t>(at.batch, at.head, query)[offset]);
    }
  }
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) s[i] *= kLog2E;
}

// -inf where the band or the padding hides a key.
template <int kCount, class Padding>
FUSED_ATTN_DEVICE void hide(float (&s)[kCount], const ScoreAt& at, const Band& band,
                            const Padding& padding, int tile, int column) {
  FUSED_ATTN_UNROLL_LOOP
  for (int row = 0; row < 2; ++row) {
    const int query = at.query + 8 * row;
    const int begin = band.first(query) - at.key, end = band.end(query) - at.key;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 2 * row; i < kCount; i += (i & 1) != 0 ? 3 : 1) {
      const int offset = (i >> 2) * 8 + (i & 1);
      if (offset < begin || offset >= end) s[i] = -device::infinity();
    }
  }
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
template <int kCount>
FUSED_ATTN_DEVICE void hide_by_mask(float (&s)[kCount], const DeviceProblem& p, const ScoreAt& at,
                                    const Band& band, const Sequence& sequence) {
  if (p.mask.data == nullptr) return;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; ++i) {
    const int query = at.query_of(i), key = at.key_of(i);
    if (query >= sequence.seqlen_q || key >= band.end(query)) continue;
    const uint8_t* row = p.mask.at<uint8_t>(at.batch, at.head, query);
    if (row[key * p.mask.stride[3]] == 0) s[i] = -device::infinity();
  }
}

// Which elements the dropout keeps, a bit each. Key j of query i draws word j & 3 of the Philox
// block (j >> 2, i, n, offset). Two neighbouring threads need the same two blocks, of rows i and
// i + 8: each draws one of them and hands over the half that the other needs.
template <int kCount>
FUSED_ATTN_DEVICE void drop(float (&probability)[kCount], const DeviceProblem& p, int n,
                            const ScoreAt& at) {
  const device::Philox philox(p.rng[0], p.rng[1]);
  const bool odd = (at.key & 2) != 0;
  FUSED_ATTN_UNROLL_LOOP
  for (int j = 0; j < kCount / 4; ++j) {
    uint32_t word[4];
    philox.draw(static_cast<uint32_t>(at.key + 8 * j) >> 2,
                static_cast<uint32_t>(at.query + (odd ? 8 : 0)), static_cast<uint32_t>(n), word);
    const uint32_t theirs[2] = {device::shuffle_xor(odd ? word[0] : word[2], 1),
                                device::shuffle_xor(odd ? word[1] : word[3], 1)};
    FUSED_ATTN_UNROLL_LOOP
    for (int c = 0; c < 2; ++c) {
      const uint32_t upper = odd ? theirs[c] : word[c];
      const uint32_t lower = odd ? word[2 + c] : theirs[c];
      if (upper < p.keep_from) probability[4 * j + c] = 0.0f;
      if (lower < p.keep_from) probability[4 * j + 2 + c] = 0.0f;
    }
  }
}

}  // namespace fused_attn::attention
