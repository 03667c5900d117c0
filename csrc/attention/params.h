// What one attention call is, in raw pointers, sizes and strides (elements).
//
// Dense problems: the views below are indexed (batch, head, row, column).
// Packed problems (`cu_seqlens_q != nullptr`): the views have batch stride 0, sequence b owns the
// query rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) and the key rows of cu_seqlens_k likewise, and
// `seqlen_q` / `seqlen_k` are upper bounds over all sequences. Row and column positions (i, j) are
// always local to their sequence.
//
// Score (all in float32, float64 for float64), with i, j the query and key position:
//   s = scale * q . k
//   s = softcap * tanh(s / softcap)                      if softcap > 0
//   s = s - alibi_slopes[h] * |i + (Lk - Lq) - j|        if alibi_slopes
//   s = s + bias                                         if bias
// and s = -inf where any mask hides (i, j). Lq and Lk are the lengths of the sequence at hand
// (`key_lengths` does not move diagonals: it is a padding mask). Bias and mask of a packed problem
// are indexed (sequence, head, i, j).
#pragma once

#include "common/types.h"

namespace fused_attn::attention {

struct PairFunctions;  // attention/functions.h

enum class Causal : int { kNone = 0, kUpperLeft = 1, kLowerRight = 2 };

struct Params {
  DType dtype = DType::kFloat32;  // of q, k, v, out and their gradients
  int64_t batch = 0;              // number of sequences when packed
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;  // divides num_heads; query head h reads h / (num_heads / num_heads_kv)
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t rows_q = 0;  // rows of the tensors: those of all sequences when packed
  int64_t rows_k = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;

  View4 q, k, v, out;
  View4 lse;  // (B, H, Lq, unused): natural logarithm, float32 (float64 for float64); may be absent

  View4 bias;                                 // dtype of its own: float32, or that of q
  View4 mask;                                 // bool, true = visible
  const uint8_t* key_padding_mask = nullptr;  // (B, Lk), non-zero = visible
  int64_t key_padding_stride[2] = {0, 0};
  const int64_t* key_lengths = nullptr;   // (B,): keys j >= key_lengths[b] are invisible
  const float* alibi_slopes = nullptr;    // (H,)
  const int32_t* cu_seqlens_q = nullptr;  // (batch + 1,)
  const int32_t* cu_seqlens_k = nullptr;
  const int64_t* rng = nullptr;  // {seed, offset} of the dropout; absent = no dropout

  // Visible iff, with d = i + shift - j:  causal: d >= 0;  window_left >= 0: d <= window_left;
  // window_right >= 0: -d <= window_right.  shift = 0 for kUpperLeft, else Lk - Lq.
  // Of these, keys j < prefix_lengths[b] are exempt.  chunk > 0: floor((i + shift) / chunk) ==
  // floor(j / chunk).  Documents: query_documents[b, i] == key_documents[b, j]; int32 or int64,
  // indexed like rows of q and k.
  Causal causal = Causal::kNone;
  int64_t window_left = -1;
  int64_t window_right = -1;
  double scale = 1.0;
  double softcap = 0.0;
  double dropout_p = 0.0;
  int64_t chunk = 0;
  const int64_t* prefix_lengths = nullptr;  // (B,)
  View4 query_documents;                    // (B, Lq), one dtype for both
  View4 key_documents;                      // (B, Lk)
  // More hidden pairs, and what becomes of scale * q . k; not beside softcap, ALiBi, bias, packed
  // problems or weights. CPU only.
  const PairFunctions* functions = nullptr;
  int threads = 1;
};

// The forward with attention weights: softmax(s), times the dropout factor where there is dropout.
// weights (B, H, Lq, Lk), or (B, 1, Lq, Lk) averaged over heads.
struct WeightsParams : Params {
  View4 weights;
  bool average = false;
};

// Gradients. dbias is float32 (float64 for float64), its strides are 0 where bias is broadcast, and
// the kernel adds up over those dimensions; it comes zero-filled. dweights is the gradient of the
// weights above, in their shape (1 head and already divided by num_heads when averaged). On the CPU
// out and lse may both be absent: the backward then starts with the forward.
struct BackwardParams : Params {
  View4 dout, dq, dk, dv, dbias;
  View4 dlse;  // like lse; may be absent
  View4 dweights;
};

}  // namespace fused_attn::attention
