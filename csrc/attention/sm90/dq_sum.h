// dq added up over blocks of keys, in float32 in global memory: where its numbers lie, how the
// dk, dv kernel adds to them, and the kernel that makes the gradient of q of the sum.
//
// It comes transposed, dq^T = k^T ds^T, so that the product's 64 rows are columns of k however few
// queries a tile has. Bulk reductions add it up: float32 sums in an order that nobody promises.
//
// Barriers: of the dk, dv kernel, those in dkdv.h; of the other kernel, none.
#pragma once

#include "attention/sm90/backward.h"

namespace fused_attn::attention {

// The sum lies as the products leave it. Per head, over the padded rows of the statistics: tiles of
// `block_m` queries; in a tile, slices of 16 columns (a warp's rows of dq^T); in a slice, pieces of
// 8 queries; in a piece, four numbers a lane: columns c and c + 8 of queries i and i + 1, with
// c = lane / 4 and i = 2 (lane % 4).
constexpr int kSliceColumns = 16;
constexpr int kPieceQueries = 8;
constexpr int kPieceNumbers = kSliceColumns * kPieceQueries;

// Numbers of a row of the sum: head_dim in whole slices.
FUSED_ATTN_DEVICE int dq_sum_columns(const DeviceProblem& p) {
  return (p.head_dim + kSliceColumns - 1) / kSliceColumns * kSliceColumns;
}

// The piece of the 8 queries from `query` on.
FUSED_ATTN_DEVICE float* dq_piece(const BackwardProblem& p, const Sequence& s, int head,
                                  int block_m, int query, int slice) {
  const int64_t row =
      int64_t{head} * p.padded_rows + statistics_start(p, s) + query / block_m * block_m;
  return p.dq_sum + row * dq_sum_columns(p) +
         (slice * (block_m / kPieceQueries) + query % block_m / kPieceQueries) * kPieceNumbers;
}

// What a consumer warpgroup of the dk, dv kernel does for dq. ds^T lies in shared memory twice, in
// turn: who has met the others in one step knows that they have read what they met for in the one
// before it. Nothing is kept in registers from step to step: they are full.
template <class Config>
struct DqAdder {
  static constexpr int kQueries = Config::kDqQueries;
  using Accumulator = float[kQueries / 2];
  using Product = device::Mma<typename Config::Element, kQueries, true, true>;

  static FUSED_ATTN_DEVICE int first_query(int group) {
    return Config::kDqByQueries ? group * kQueries : 0;
  }

  // dq^T = k^T ds^T for the columns of one panel of k.
  static FUSED_ATTN_DEVICE void issue(Accumulator& dq, SharedAddress k, SharedAddress ds, int panel,
                                      int group) {
    const uint64_t a = Config::KvTile::by_columns(k + panel * Config::KvTile::kPanelBytes);
    const int part = Config::kDqByQueries ? group : 0;
    const uint64_t b = Config::DsTile::by_columns(ds + part * Config::DsTile::kPanelBytes);
    device::mma_fence();
    FUSED_ATTN_UNROLL_LOOP
    for (int s = 0; s < Config::kBlockN / 16; ++s) {
      Product::from_shared(dq, a + Config::KvTile::column_step(s),
                           b + Config::DsTile::column_step(s), s != 0);
    }
    device::mma_commit();
  }

  // Adds it to the sum: every warp its own slice, through a place of its own from `stage` on.
  static FUSED_ATTN_DEVICE void add(const Accumulator& dq, const BackwardProblem& p,
                                    const Sequence& sequence, int head, int tile, int panel,
                                    int group, SharedAddress stage) {
    const int thread = device::opaque(device::thread_index()) % device::kWarpgroupThreads;
    const int lane = thread % device::kWarpThreads;
    // The same for the whole warp, and known to be so: after a branch that is not, descriptors
    // would be worked out by every thread.
    const int warp = device::shuffle(thread / device::kWarpThreads, 0);
    const int slice = panel * 4 + warp;
    if (slice * kSliceColumns >= p.head_dim) return;
    stage += (Config::kSplit ? warp : group * 4 + warp) * Config::kDqStageBytes;
    device::wait_stores();
    device::sync_warp();
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kQueries / 2; i += 4) {
      device::shared_store4(stage + (i / 4 * device::kWarpThreads + lane) * 16, dq[i], dq[i + 1],
                            dq[i + 2], dq[i + 3]);
    }
    device::fence_async();
    device::sync_warp();
    const int query = tile * Config::kBlockM + first_query(group);
    device::add_bulk_by_warp(dq_piece(p, sequence, head, Config::kBlockM, query, slice), stage,
                             Config::kDqStageBytes);
  }
};

constexpr int kConvertThreads = 256;
constexpr int kConvertQueries = kConvertThreads / device::kWarpThreads * kPieceQueries;
constexpr int kConvertColumns = 4 * kSliceColumns;

// dq = scale * sum, in the type of q. A warp takes 8 queries and 64 columns: a lane 16 columns of
// one query.
template <class Element>
FUSED_ATTN_KERNEL(kConvertThreads)
convert_dq_kernel(FUSED_ATTN_GRID_CONSTANT BackwardProblem p, const int block_m) {
  const int lane = device::thread_index() % device::kWarpThreads;
  const int warp = device::thread_index() / device::kWarpThreads;
  const int column_blocks = (p.head_dim + kConvertColumns - 1) / kConvertColumns;
  const int row_blocks = (p.seqlen_q + kConvertQueries - 1) / kConvertQueries;
  const int row_block = device::block_index() / column_blocks % row_blocks;
  const int head = device::block_index() / column_blocks / row_blocks % p.num_heads;
  const Sequence sequence(p, device::block_index() / column_blocks / row_blocks / p.num_heads);
  const int slice = device::block_index() % column_blocks * 4 + lane % 4;
  const int first = row_block * kConvertQueries + warp * kPieceQueries;
  const int query = first + lane / 4, row = sequence.start_q + query;
  if (slice * kSliceColumns >= p.head_dim || query >= sequence.seqlen_q || row >= p.rows_q) return;

  const float* from =
      dq_piece(p, sequence, head, block_m, first, slice) + lane / 8 * 4 + lane / 4 % 2;
  struct alignas(16) Pairs {
    uint32_t value[4];
  };
  Pairs pairs[2];
  FUSED_ATTN_UNROLL_LOOP
  for (int c = 0; c < kSliceColumns; c += 2) {
    const float* at = from + c % 8 * 16 + c / 8 * 2;
    pairs[c / 8].value[c % 8 / 2] = Element::pack(at[0] * p.scale, at[16] * p.scale);
  }
  uint16_t* to = const_cast<uint16_t*>(p.dq.at<uint16_t>(sequence.tensor_batch, head, row));
  const int column = slice * kSliceColumns;
  if (p.dq_by_tile && column + kSliceColumns <= p.head_dim) {
    auto* whole = reinterpret_cast<Pairs*>(to + column);
    device::global_store(whole, pairs[0]);
    device::global_store(whole + 1, pairs[1]);
    return;
  }
  FUSED_ATTN_UNROLL_LOOP
  for (int c = 0; c < kSliceColumns; ++c) {
    const uint32_t pair = pairs[c / 8].value[c % 8 / 2];
    if (column + c < p.head_dim) {
      device::global_store(to + (column + c) * p.dq.stride[3],
                           static_cast<uint16_t>(c % 2 == 0 ? pair : pair >> 16));
    }
  }
}

}  // namespace fused_attn::attention
