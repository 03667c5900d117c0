// What the GPU kernels are told of a call: Params in the types and units that the device wants.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace fused_attn::attention {

// A 4-D operand in global memory; strides count elements, 0 for a broadcast dimension.
struct DeviceView {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  bool wide = false;  // float32 rather than the 16-bit type of q

  template <class T>
  FUSED_ATTN_DEVICE const T* at(int batch, int head, int row) const {
    return static_cast<const T*>(data) + batch * stride[0] + head * stride[1] + row * stride[2];
  }
};

// Keys that masks may cover and blocks of queries keep a bit each of in shared memory.
constexpr int kMaxKeyBits = 32 * 1024;

struct DeviceProblem {
  int batch, num_heads, group;  // `group` query heads share a key head
  int seqlen_q, seqlen_k;       // the longest of a packed problem
  int rows_q, rows_k;           // of the tensors
  int head_dim, head_dim_v;

  // Query i sees the keys j with low <= j - i - shift <= high, where shift is Lk - Lq of the
  // sequence if `aligned_right`, else 0.
  int low, high;
  bool aligned_right;

  float scale, softcap;
  float scale_log2;             // scale * log2(e)
  bool general;                 // anything but causal, window, key lengths and padding
  float keep_scale;             // 1 / (1 - dropout_p); 0 if nothing is kept
  uint32_t keep_from;           // a random word is kept iff it is at least this
  const int64_t* rng;           // {seed, offset}; null = no dropout
  const int32_t* cu_seqlens_q;  // null = not packed
  const int32_t* cu_seqlens_k;
  const int64_t* key_lengths;
  const uint8_t* key_padding;
  int64_t key_padding_stride[2];
  bool key_bits;  // PaddingBits are there
  const float* alibi_slopes;
  DeviceView bias, mask;
  int first_head, head_count;  // of all heads of the batch: those that blocks of queries work on
  // Heads (of q, or of k and v) whose tensors the second-level cache holds together.
  int heads_together, key_heads_together;
  DeviceView out;  // written element by element unless `out_by_tile`
  bool out_by_tile;
  float* lse;  // may be null
  int64_t lse_stride[3];
  // Of the backward, null in a forward. Per head and query, with rows padded to tiles (see
  // statistics_start): what turns scores, as the kernel keeps them, into probabilities
  // 2^(scale_log2 * (score - base) - lse2). Where lse is so large that its rounding shows, base is
  // the largest score, and lse2 that of the differences; else base is 0.
  float *lse2, *base;
  int padded_rows;
};

// The sequence that a block works on: where it starts in the tensors, and how long it is.
struct Sequence {
  int batch;         // as masks, lengths and dropout count it
  int tensor_batch;  // as tensors count it: 0 for all sequences of a packed problem
  int start_q, start_k;
  int seqlen_q, seqlen_k;

  FUSED_ATTN_DEVICE Sequence(const DeviceProblem& p, int batch_)
      : batch(batch_),
        tensor_batch(batch_),
        start_q(0),
        start_k(0),
        seqlen_q(p.seqlen_q),
        seqlen_k(p.seqlen_k) {
    if (p.cu_seqlens_q == nullptr) return;
    start_q = p.cu_seqlens_q[batch];
    start_k = p.cu_seqlens_k[batch];
    seqlen_q = p.cu_seqlens_q[batch + 1] - start_q;
    seqlen_k = p.cu_seqlens_k[batch + 1] - start_k;
    tensor_batch = 0;
  }
};

// Which head (over the batch) a block of the grid works on, and which of its `blocks` pieces. Heads
// that the cache holds together take turns, so that all their first pieces start before all their
// second ones: those with the most to do come first, and the last to start are short.
struct BlockPlace {
  int head, piece;

  FUSED_ATTN_DEVICE BlockPlace(int index, int blocks, int heads, int together) {
    const int section = index / (blocks * together), rest = index % (blocks * together);
    const int turns = device::smaller(together, heads - section * together);
    head = section * together + rest % turns;
    piece = rest / turns;
  }
};

// Rows of statistics are padded, a sequence's to whole tiles of this many.
constexpr int kStatisticsTile = 64;

// Where the statistics of a sequence begin among those of its head.
FUSED_ATTN_DEVICE int statistics_start(const DeviceProblem& p, const Sequence& s) {
  if (p.cu_seqlens_q != nullptr) {
    return (s.start_q / kStatisticsTile + s.batch) * kStatisticsTile;
  }
  return s.batch * ((p.seqlen_q + kStatisticsTile - 1) / kStatisticsTile * kStatisticsTile);
}

// Where those of the queries from `query` on are.
FUSED_ATTN_DEVICE int64_t statistics_at(const DeviceProblem& p, const Sequence& s, int head,
                                        int query) {
  return int64_t{head} * p.padded_rows + statistics_start(p, s) + query;
}

// Has any of the first `count` rows a base? For a warp.
template <int kRows>
FUSED_ATTN_DEVICE bool any_base(const float* base, int count) {
  bool found = false;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kRows; i += device::kWarpThreads) {
    const int row = i + device::thread_index() % device::kWarpThreads;
    found = found || (row < kRows && row < count && base[row] != 0.0f);
  }
  return device::ballot(found) != 0;
}

template <class Element>
FUSED_ATTN_DEVICE float read_bias(const DeviceProblem& p, int batch, int head, int query, int key) {
  const int64_t offset = key * p.bias.stride[3];
  if (p.bias.wide) return p.bias.at<float>(batch, head, query)[offset];
  return Element::widen(p.bias.at<uint16_t>(batch, head, query)[offset]);
}

}  // namespace fused_attn::attention
