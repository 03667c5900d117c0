// A kernel in miniature, right and with one mistake at a time: a producer thread brings tiles of A
// and B in two stages, a warpgroup adds up A B^T, stores the sum, and adds part of it to numbers in
// global memory, in two rounds through one place in shared memory.
#pragma once

#include "attention/sm90/block.h"

namespace fused_attn::emulator {

using namespace device;
using attention::SharedTile;
using Element = device::BFloat16;

enum class Fault {
  kNone,
  kNoFullWait,          // reads a stage without waiting for its copy
  kWrongPhase,          // waits for the phase that is long over
  kNoRelease,           // never hands a stage back
  kEarlyRelease,        // hands it back while the product still reads it
  kTooFewBytes,         // announces half of the bytes that come
  kTooManyBytes,        // announces more than come
  kTwoArrivals,         // arrives twice in a phase that expects one
  kNoMatrixFence,       // no wgmma.fence before the product
  kNoMatrixWait,        // reads the accumulator while the product runs
  kAccumulatorTouched,  // writes it while the product runs
  kOperandTouched,      // writes a register operand while the product runs
  kNoProxyFence,        // stores a tile that the copy engine may not see yet
  kNoStoreWait,         // ends while the store may still read shared memory
  kMisalignedTile,      // a tile that does not start at a swizzle's boundary
  kOutOfBounds,         // leaves the block's shared memory
  kUnwritten,           // loads what nobody wrote
  kUnswizzled,          // a descriptor without the swizzle
  kDivergence,          // half a warp shuffles, the other half votes
  kBarrierCount,        // a named barrier with two ideas of its size
  kLonelyBarrier,       // a named barrier to which the others never come
  kNoBarrierInit,       // waits at an mbarrier that does not exist
  kTooManyRegisters,    // setmaxnreg beyond what the block has
  kProductsLeft,        // ends without waiting for its products
  kNoReductionFence,    // adds what the copy engine may not see yet
  kStageReused,         // stores where a reduction may still read
  kReductionForgotten,  // waits for reductions that it has not committed
  kMisalignedReduction,
  kNoReductionWait,   // ends while a reduction may still read shared memory
  kOneLaneWaits,      // waits for what another lane of its warp has issued
  kLoadSkipped,       // the producer skips a tile that the consumers visit
  kVisitSkipped,      // the consumers skip a tile that the producer loads
  kOneArrival,        // hands a stage back for others, whose plain reads it does not know of
  kUnorderedLoad,     // loads what another thread stores, with no barrier between
  kUnorderedStore,    // stores where another thread loads, with no barrier between
  kUnorderedCopy,     // stores a tile that others have written, with no barrier between
  kUnorderedProduct,  // multiplies what others have written, with no barrier between
  kNoInitFence,       // copies complete mbarriers that they need not know of
  kNoInitBarrier,     // others use mbarriers that they need not know of
  kTwoBlocks,         // two blocks store to the same memory
  kTwoBlocksAdd,      // one block adds where another stores
  kPartialPiece,      // stores to columns that end within 16 bytes
  kShiftedMap,        // loads through a map that begins before its tensor
};

constexpr int kSize = 64;  // rows and columns of every tile
constexpr int kSteps = 5;  // tiles of A and B
constexpr int kStages = 2;
constexpr int kThreads = 2 * kWarpgroupThreads;
using Tile = SharedTile<kSize, kSize>;
constexpr uint32_t kB = kStages * Tile::kBytes;
constexpr uint32_t kOut = 2 * kStages * Tile::kBytes;
constexpr int kPiece = 4 * kWarpThreads;  // numbers that a warp adds in a round
constexpr uint32_t kAdded = kOut + Tile::kBytes;
constexpr uint32_t kWords = kAdded + 4 * kPiece * 4;  // one a thread of the warpgroup
constexpr uint32_t kBarriers = kWords + 4 * kWarpgroupThreads;
constexpr uint32_t kSharedBytes = kBarriers + 64 + 1024;

struct Maps {
  TensorMap a, b, out;
  TensorMap shifted;  // of a, from kSize rows before it on
  float* added;       // 4 warps x kPiece
  float* of_blocks;   // a number for each of two blocks
};

struct Kernel {
  const Maps& maps;
  Fault fault;
  SharedAddress base = (shared_base() + 1023u) & ~1023u;

  bool is(Fault other) const { return fault == other; }
  SharedAddress full(int stage) const { return base + kBarriers + 8 * stage; }
  SharedAddress empty(int stage) const { return base + kBarriers + 16 + 8 * stage; }

  void run() const {
    if (thread_index() == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full(stage), 1, "full");
        const int arrivals = is(Fault::kOneArrival) ? 1 : kWarpgroupThreads / kWarpThreads;
        if (!is(Fault::kNoBarrierInit)) barrier_init(empty(stage), arrivals, "empty");
      }
      if (!is(Fault::kNoInitFence)) fence_barrier_init();
      write_of_block();
    }
    if (!is(Fault::kNoInitBarrier)) sync_block();
    if (thread_index() < kWarpgroupThreads) {
      lower_registers<40>();
      if (thread_index() == 0) produce();
    } else {
      if (is(Fault::kTooManyRegisters)) {
        raise_registers<256>();
      } else {
        raise_registers<216>();
      }
      consume();
    }
  }

  // By one thread of each of two blocks; the second one does nothing else.
  void write_of_block() const {
    const bool same = is(Fault::kTwoBlocks) || is(Fault::kTwoBlocksAdd);
    float* const to = maps.of_blocks + (same ? 0 : block_index());
    if (is(Fault::kTwoBlocksAdd) && block_index() == 1) {
      atomic_add(to, 1.0f);
    } else {
      global_store(to, 1.0f);
    }
  }

  void produce() const {
    attention::Ring<kStages> ring;
    for (int step = 0; step < kSteps; ++step) {
      if (is(Fault::kLoadSkipped) && step == 2) continue;
      const int stage = ring.stage;
      barrier_wait(empty(stage), ring.phase ^ 1);
      const uint32_t bytes = is(Fault::kTooFewBytes)    ? Tile::kBytes
                             : is(Fault::kTooManyBytes) ? 3 * Tile::kBytes
                                                        : 2 * Tile::kBytes;
      barrier_expect(full(stage), bytes);
      const uint32_t shift = is(Fault::kMisalignedTile) ? 128 : 0;
      const TileAt at{0, step * kSize, 0, 0, 0};
      const bool shifted = is(Fault::kShiftedMap) && step == 2;
      const TileAt at_a{0, step * kSize + (shifted ? kSize : 0), 0, 0, 0};
      load_tile<Keep::kLong>(base + stage * Tile::kBytes + shift, shifted ? maps.shifted : maps.a,
                             full(stage), at_a);
      load_tile<Keep::kLong>(base + kB + stage * Tile::kBytes, maps.b, full(stage), at);
      if (is(Fault::kTwoArrivals) && step == 1) barrier_arrive(full(stage));
      ring.advance();
    }
  }

  void consume() const {
    const int thread = thread_index() % kWarpgroupThreads;
    small_mistakes(thread);
    float sum[kSize / 2] = {};
    uint32_t ones[4] = {Element::pack(1, 1), Element::pack(1, 1), Element::pack(1, 1),
                        Element::pack(1, 1)};
    attention::Ring<kStages> ring;
    for (int step = 0; step < kSteps; ++step) {
      if (is(Fault::kVisitSkipped) && step == 2) continue;
      const int stage = ring.stage;
      const bool here = step == 2;  // mistakes are made in the third step
      if (!(is(Fault::kNoFullWait) && here)) {
        barrier_wait(full(stage), is(Fault::kWrongPhase) && here ? ring.phase ^ 1 : ring.phase);
      }
      // A plain read of what the stage holds, besides the product's.
      shared_load_float(base + kB + stage * Tile::kBytes + 4 * thread);
      multiply(sum, ones, stage, here);
      if (is(Fault::kEarlyRelease)) release(empty(stage), thread);
      if (is(Fault::kAccumulatorTouched) && here) sum[3] = 0.0f;
      if (is(Fault::kOperandTouched) && here) ones[1] = 0;
      const bool wait = !((is(Fault::kNoMatrixWait) && step == kSteps - 1) ||
                          (is(Fault::kProductsLeft) && step == kSteps - 1));
      if (wait) mma_wait<0>();
      if (is(Fault::kOperandTouched) && here) ones[1] = ones[0];
      const bool forget = is(Fault::kEarlyRelease) || (is(Fault::kNoRelease) && here);
      if (!forget) release(empty(stage), thread);
      ring.advance();
    }
    if (is(Fault::kProductsLeft)) return;
    exchange(thread);
    if (is(Fault::kUnorderedProduct)) multiply_written(sum);
    store(sum, thread);
    if (!is(Fault::kNoStoreWait)) add(sum, thread);  // which waits
    if (is(Fault::kNoMatrixWait)) mma_wait<0>();
  }

  // The warpgroup has read the stage: every warp says so for itself.
  void release(SharedAddress barrier, int thread) const {
    sync_warp();
    const int who = is(Fault::kOneArrival) ? kWarpgroupThreads : kWarpThreads;
    if (thread % who == 0) barrier_arrive(barrier);
  }

  // Every thread stores a word and loads that of another warp's, twice.
  void exchange(int thread) const {
    const SharedAddress words = base + kWords;
    shared_store(words + 4 * thread, 0.0f);
    named_sync(1, kWarpgroupThreads);
    for (int round = 0; round < 2; ++round) {
      shared_store(words + 4 * thread, 1.0f);
      if (!is(Fault::kUnorderedLoad)) named_sync(1, kWarpgroupThreads);
      shared_load_float(words + 4 * ((thread + kWarpThreads) % kWarpgroupThreads));
      if (!is(Fault::kUnorderedStore)) named_sync(1, kWarpgroupThreads);
    }
  }

  // A product with what the warpgroup has just written, fenced, but with no barrier of the threads.
  void multiply_written(float (&sum)[kSize / 2]) const {
    attention::fragment_to_tile<Element, Tile>(sum, base + kOut, 0);
    fence_async();
    const uint64_t tile = Tile::by_rows(base + kOut);
    mma_fence();
    for (int k = 0; k < kSize / 16; ++k) {
      Mma<Element, kSize, false, false>::from_shared(sum, tile + Tile::row_step(k),
                                                     tile + Tile::row_step(k), true);
    }
    mma_commit();
    mma_wait<0>();
    named_sync(1, kWarpgroupThreads);
  }

  // sum += A B^T, and nothing from the register operand but a product with zeros of B's size.
  void multiply(float (&sum)[kSize / 2], uint32_t (&ones)[4], int stage, bool here) const {
    uint64_t a = Tile::by_rows(base + stage * Tile::kBytes);
    const uint64_t b = Tile::by_rows(base + kB + stage * Tile::kBytes);
    if (is(Fault::kUnswizzled) && here) a &= ~(3ull << 62);
    if (!(is(Fault::kNoMatrixFence) && here)) mma_fence();
    for (int k = 0; k < kSize / 16; ++k) {
      Mma<Element, kSize, false, false>::from_shared(sum, a + Tile::row_step(k),
                                                     b + Tile::row_step(k), true);
    }
    Mma<Element, kSize, false, false>::from_registers(sum, ones[0], ones[1], ones[2], ones[3], b,
                                                      true);
    mma_commit();
  }

  void store(const float (&sum)[kSize / 2], int thread) const {
    attention::fragment_to_tile<Element, Tile>(sum, base + kOut, 0);
    if (!is(Fault::kNoProxyFence)) fence_async();
    if (!is(Fault::kUnorderedCopy)) named_sync(1, kWarpgroupThreads);
    if (thread != 0) return;
    store_tile(maps.out, base + kOut, {0, 0, 0, 0, 0});
    commit_stores();
    if (!is(Fault::kNoStoreWait)) wait_stores();
  }

  // Registers 0 to 3 of every thread, twice.
  void add(const float (&sum)[kSize / 2], int thread) const {
    const int warp = thread / kWarpThreads, lane = thread % kWarpThreads;
    const SharedAddress stage = base + kAdded + warp * kPiece * 4;
    for (int round = 0; round < 2; ++round) {
      shared_store4(stage + 16 * lane, sum[0], sum[1], sum[2], sum[3]);
      if (!is(Fault::kNoReductionFence)) fence_async();
      sync_warp();
      if (is(Fault::kOneLaneWaits)) {
        add_bulk_by_warp(maps.added + warp * kPiece, stage, kPiece * 4);
        if (lane == 0) wait_stores();
      } else if (lane == 0) {
        const uint32_t shift = is(Fault::kMisalignedReduction) && warp == 0 ? 8 : 0;
        add_bulk(maps.added + warp * kPiece, stage + shift, kPiece * 4);
        if (!is(Fault::kReductionForgotten)) commit_stores();
        const bool skip = round == 0 ? is(Fault::kStageReused) : is(Fault::kNoReductionWait);
        if (!skip) wait_stores();
      }
      sync_warp();
    }
  }

  void small_mistakes(int thread) const {
    if (is(Fault::kOutOfBounds) && thread == 5) shared_store(base + kSharedBytes, 1.0f);
    if (is(Fault::kUnwritten) && thread == 5) shared_load_float(base + kOut);
    if (is(Fault::kDivergence)) {
      if (thread % 32 < 16) {
        shuffle(1.0f, 0);
      } else {
        ballot(true);
      }
    }
    if (is(Fault::kBarrierCount)) named_sync(2, thread < 64 ? 64 : 128);
    if (is(Fault::kLonelyBarrier)) named_sync(2, 256);
  }
};

inline void fault_kernel(const Maps maps, const Fault fault) {
  const Kernel kernel{maps, fault};
  if (block_index() == 0) {
    kernel.run();
  } else if (thread_index() == 0) {
    kernel.write_of_block();
  }
}

}  // namespace fused_attn::emulator
