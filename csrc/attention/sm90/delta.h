// The row statistics of the backward: delta = rowsum(dout * out) - dlse, and lse in base 2. Where
// dq is to be added up, its sum starts from the zeros that this kernel writes.
//
// Barriers: none; a warp works by itself.
#pragma once

#include "attention/sm90/dq_sum.h"

namespace fused_attn::attention {

constexpr int kDeltaThreads = 256;
constexpr int kDeltaRows = kDeltaThreads / device::kWarpThreads;

// A warp a row, over all rows of the padded tiles. out and dout have an even stride.
template <class Element>
FUSED_ATTN_KERNEL(kDeltaThreads)
delta_kernel(FUSED_ATTN_GRID_CONSTANT BackwardProblem p) {
  const int tiles = (p.seqlen_q + kStatisticsTile - 1) / kStatisticsTile;
  const int blocks = tiles * (kStatisticsTile / kDeltaRows);  // per sequence and head
  const int head = device::block_index() / blocks % p.num_heads;
  const Sequence sequence(p, device::block_index() / blocks / p.num_heads);
  const int lane = device::thread_index() % device::kWarpThreads;
  const int row =
      device::block_index() % blocks * kDeltaRows + device::thread_index() / device::kWarpThreads;
  // The tiles of a sequence end where those of the next one begin.
  if (row / kStatisticsTile * kStatisticsTile >= sequence.seqlen_q) return;
  const int64_t to = statistics_at(p, sequence, head, row);
  if (p.dq_sum != nullptr) {
    const int columns = dq_sum_columns(p);
    for (int c = lane; c < columns; c += device::kWarpThreads) {
      device::global_store(p.dq_sum + to * columns + c, 0.0f);
    }
  }
  float sum = 0.0f, lse = -device::infinity();
  const int in_tensor = sequence.start_q + row;
  if (row < sequence.seqlen_q && in_tensor < p.rows_q) {
    const auto* out = p.result_out.at<uint16_t>(sequence.tensor_batch, head, in_tensor);
    const auto* dout = p.dout.at<uint16_t>(sequence.tensor_batch, head, in_tensor);
    for (int c = 2 * lane; c < p.head_dim_v; c += 2 * device::kWarpThreads) {
      sum += Element::widen(out[c]) * Element::widen(dout[c]);
      if (c + 1 < p.head_dim_v) sum += Element::widen(out[c + 1]) * Element::widen(dout[c + 1]);
    }
    lse = p.forward_lse[sequence.tensor_batch * p.forward_lse_stride[0] +
                        head * p.forward_lse_stride[1] + in_tensor * p.forward_lse_stride[2]];
  }
  FUSED_ATTN_UNROLL_LOOP
  for (int mask = 1; mask < device::kWarpThreads; mask *= 2) sum += device::shuffle_xor(sum, mask);
  if (lane != 0) return;
  const bool seen = lse != -device::infinity();
  if (seen && p.dlse != nullptr) {
    sum -= p.dlse[sequence.tensor_batch * p.dlse_stride[0] + head * p.dlse_stride[1] +
                  in_tensor * p.dlse_stride[2]];
  }
  // A row that sees nothing, or is not there, gets probabilities of 0. A base that is not 0 asks
  // the forward kernel for the statistics of the row.
  device::global_store(p.lse2 + to, seen ? lse * kLog2E : device::infinity());
  device::global_store(p.base + to, seen && device::magnitude(lse) > kMaxLse ? 1.0f : 0.0f);
  device::global_store(p.delta + to, seen ? sum : 0.0f);
}

}  // namespace fused_attn::attention
