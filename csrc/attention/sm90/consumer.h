// What the kernels of attention do in the same way: how a block divides into a producer and
// consumer warpgroups, the two shapes of matrix product, and how rows leave.
#pragma once

#include "attention/sm90/block.h"
#include "attention/sm90/score.h"

namespace fused_attn::attention {

// Thread 0 of the block prepares the barriers, all of it runs `prepare()`; then warpgroup 0 runs
// `produce(warp)` and the others `consume(group)`, each with the registers that it needs.
template <class Config, class Shared, class Prepare, class Produce, class Consume>
FUSED_ATTN_DEVICE void run_warpgroups(const Shared& shared, const Prepare& prepare,
                                      const Produce& produce, const Consume& consume) {
  // The same for all threads of a warp, and known to be so: branches on it are uniform.
  const int group = device::shuffle(device::thread_index() / device::kWarpgroupThreads, 0);
  if (device::thread_index() == 0) shared.init_barriers();
  prepare();
  device::sync_block();
  if (group == 0) {
    device::lower_registers<Config::kProducerRegisters>();
    produce(device::thread_index() / device::kWarpThreads);
  } else {
    device::raise_registers<Config::kConsumerRegisters>();
    consume(group - 1);
  }
}

// A consumer warpgroup, as one of its threads sees it.
template <class Config, class Problem>
class Consumer {
 protected:
  FUSED_ATTN_DEVICE Consumer(const Problem& p, int group)
      : p_(p),
        group_(group),
        thread_(device::thread_index() % device::kWarpgroupThreads),
        fragment_(thread_) {}

  // Of scores as the kernel keeps them, to come to base e and to base 2: the plain kernels keep
  // q . k.
  FUSED_ATTN_DEVICE float scale() const { return Config::kGeneral ? 1.0f : p_.scale; }
  FUSED_ATTN_DEVICE float scale_log2() const { return Config::kGeneral ? kLog2E : p_.scale_log2; }
  // This warpgroup's products have read what the barrier is the "empty" one of: one thread that has
  // waited for them knows it.
  FUSED_ATTN_DEVICE void release(SharedAddress empty) const {
    if (thread_ == 0) device::barrier_arrive(empty);
  }
  // The same where threads have read it, too: of their loads nobody knows but they, so that every
  // warp arrives.
  FUSED_ATTN_DEVICE void release_by_warps(SharedAddress empty) const {
    device::sync_warp();
    if (thread_ % device::kWarpThreads == 0) device::barrier_arrive(empty);
  }

  // Ends a basic block: the compiler would put off what is computed before it behind the wait for a
  // product that follows, where it does not run beside the product. `complete`: a barrier whose
  // only phase is long over. General kernels have branches enough.
  template <int kCount, class Number>
  static FUSED_ATTN_DEVICE void finish_before_wait(Number (&results)[kCount],
                                                   SharedAddress complete) {
#ifdef FUSED_ATTN_LATE_EXP  // to compare (csrc/cuda/cuda.cmake)
    static_cast<void>(results), static_cast<void>(complete);
#else
    if constexpr (Config::kGeneral) return;
    device::keep_in_registers(results);
    device::barrier_wait(complete, 0);
#endif
  }

  const Problem& p_;
  int group_, thread_;
  Fragment fragment_;
  Ring<Config::kStages> ring_;
};

// to = a b^T: 64 rows of a tile from `a` on, and all rows of a tile at `b`.
template <class Product, class TileA, class TileB, int kColumns, int kCount>
FUSED_ATTN_DEVICE void issue_rows(float (&to)[kCount], SharedAddress a, SharedAddress b) {
  const uint64_t rows_a = TileA::by_rows(a);
  const uint64_t rows_b = TileB::by_rows(b);
  device::mma_fence();
  FUSED_ATTN_UNROLL_LOOP
  for (int k = 0; k < kColumns / 16; ++k) {
    Product::from_shared(to, rows_a + TileA::row_step(k), rows_b + TileB::row_step(k), k != 0);
  }
  device::mma_commit();
}

// to += factors b: an operand fragment, whose columns are the rows of a tile at `b`.
template <class Product, class Tile, int kCount, int kFactors>
FUSED_ATTN_DEVICE void issue_factors(float (&to)[kCount], uint32_t (&factors)[kFactors],
                                     SharedAddress b) {
  const uint64_t columns = Tile::by_columns(b);
  device::keep_in_registers(factors);
  device::mma_fence();
  FUSED_ATTN_UNROLL_LOOP
  for (int s = 0; s < kFactors / 4; ++s) {
    Product::from_registers(to, factors[4 * s], factors[4 * s + 1], factors[4 * s + 2],
                            factors[4 * s + 3], columns + Tile::column_step(s), true);
  }
  device::mma_commit();
}

// An accumulator fragment, in pairs of 16 bits, is an operand fragment.
template <class Element, int kPairs, int kCount>
FUSED_ATTN_DEVICE void pack_pairs(const float (&x)[kCount], uint32_t (&packed)[kPairs]) {
  static_assert(kCount == 2 * kPairs, "two numbers a pair");
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kPairs; ++i) packed[i] = Element::pack(x[2 * i], x[2 * i + 1]);
}

// Where rows of a tensor go: by the copy engine, or element by element where no map describes it.
struct Destination {
  const TensorMap& map;
  const DeviceView& view;
  bool by_tile;
  int rows_there, columns;  // of the tensor
};

// A warpgroup's 64 rows x to row `to_row` of a sequence. Tiles go through shared memory: the rows
// of `tile` from `row` on, which the warpgroup must have read for good. `barrier` gathers it.
template <class Element, class Tile, int kCount>
FUSED_ATTN_DEVICE void store_rows(const float (&x)[kCount], const Destination& to,
                                  const SequenceRows& rows, int to_row, SharedAddress tile, int row,
                                  int barrier) {
  if (!to.by_tile) {
    store_elements<Element>(x, to.view, rows, to.rows_there, to.columns, to_row);
    return;
  }
  fragment_to_tile<Element, Tile>(x, tile, row);
  device::fence_async();
  device::named_sync(barrier, device::kWarpgroupThreads);
  if (device::thread_index() % device::kWarpgroupThreads != 0) return;
  store_panels<Tile>(to.map, tile, row, rows, to_row);
}

}  // namespace fused_attn::attention
