// A kernel in miniature, right and with one mistake at a time: a producer thread brings tiles of A
// and B in two stages, a warpgroup adds up A B^T, stores the sum, and adds part of it to numbers in
// global memory, in two rounds through one place in shared memory. What the emulator says of each
// mistake is tested; a judge that lets one pass would prove nothing about the real kernels.
#include "emulator/faults.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "attention/sm90/block.h"
#include "cuda/launch.h"
#include "emulator/encoder.h"

namespace fused_attn::emulator {
namespace {

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
  kNoReductionWait,  // ends while a reduction may still read shared memory
  kLoadSkipped,      // the producer skips a tile that the consumers visit
  kVisitSkipped,     // the consumers skip a tile that the producer loads
  kPartialPiece,     // stores to columns that end within 16 bytes
  kShiftedMap,       // loads through a map that begins before its tensor
};

struct Named {
  const char* name;
  Fault fault;
};
constexpr Named kFaults[] = {
    {"none", Fault::kNone},
    {"no full wait", Fault::kNoFullWait},
    {"wrong phase", Fault::kWrongPhase},
    {"no release", Fault::kNoRelease},
    {"early release", Fault::kEarlyRelease},
    {"too few bytes", Fault::kTooFewBytes},
    {"too many bytes", Fault::kTooManyBytes},
    {"two arrivals", Fault::kTwoArrivals},
    {"no matrix fence", Fault::kNoMatrixFence},
    {"no matrix wait", Fault::kNoMatrixWait},
    {"accumulator touched", Fault::kAccumulatorTouched},
    {"operand touched", Fault::kOperandTouched},
    {"no proxy fence", Fault::kNoProxyFence},
    {"no store wait", Fault::kNoStoreWait},
    {"misaligned tile", Fault::kMisalignedTile},
    {"out of bounds", Fault::kOutOfBounds},
    {"unwritten", Fault::kUnwritten},
    {"unswizzled", Fault::kUnswizzled},
    {"divergence", Fault::kDivergence},
    {"barrier count", Fault::kBarrierCount},
    {"lonely barrier", Fault::kLonelyBarrier},
    {"no barrier init", Fault::kNoBarrierInit},
    {"too many registers", Fault::kTooManyRegisters},
    {"products left", Fault::kProductsLeft},
    {"no reduction fence", Fault::kNoReductionFence},
    {"stage reused", Fault::kStageReused},
    {"reduction forgotten", Fault::kReductionForgotten},
    {"misaligned reduction", Fault::kMisalignedReduction},
    {"no reduction wait", Fault::kNoReductionWait},
    {"load skipped", Fault::kLoadSkipped},
    {"visit skipped", Fault::kVisitSkipped},
    {"partial piece", Fault::kPartialPiece},
    {"shifted map", Fault::kShiftedMap},
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
constexpr uint32_t kBarriers = kAdded + 4 * kPiece * 4;
constexpr uint32_t kSharedBytes = kBarriers + 64 + 1024;

struct Maps {
  TensorMap a, b, out;
  TensorMap shifted;  // of a, from kSize rows before it on
  float* added;       // 4 warps x kPiece
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
        if (!is(Fault::kNoBarrierInit)) barrier_init(empty(stage), 1, "empty");
      }
      fence_barrier_init();
    }
    sync_block();
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
      multiply(sum, ones, stage, here);
      if (is(Fault::kEarlyRelease) && thread == 0) barrier_arrive(empty(stage));
      if (is(Fault::kAccumulatorTouched) && here) sum[3] = 0.0f;
      if (is(Fault::kOperandTouched) && here) ones[1] = 0;
      const bool wait = !((is(Fault::kNoMatrixWait) && step == kSteps - 1) ||
                          (is(Fault::kProductsLeft) && step == kSteps - 1));
      if (wait) mma_wait<0>();
      if (is(Fault::kOperandTouched) && here) ones[1] = ones[0];
      const bool release = !is(Fault::kEarlyRelease) && !(is(Fault::kNoRelease) && here);
      if (release && thread == 0) barrier_arrive(empty(stage));
      ring.advance();
    }
    if (is(Fault::kProductsLeft)) return;
    store(sum, thread);
    if (!is(Fault::kNoStoreWait)) add(sum, thread);  // which waits
    if (is(Fault::kNoMatrixWait)) mma_wait<0>();
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
    named_sync(1, kWarpgroupThreads);
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
      if (lane == 0) {
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
  Kernel{maps, fault}.run();
}

struct Matrix {
  std::vector<uint16_t> bits;
  int rows;

  Matrix(int rows_, bool random) : bits(static_cast<std::size_t>(rows_) * kSize), rows(rows_) {
    Random numbers;
    numbers.seed(static_cast<uint64_t>(rows_));
    for (uint16_t& x : bits) {
      const float value = static_cast<float>(numbers.below(17)) / 8 - 1;
      x = static_cast<uint16_t>(Element::pack(random ? value : NAN, 0.0f));
    }
  }
  float at(int row, int column) const {
    return Element::widen(bits[static_cast<std::size_t>(row) * kSize + column]);
  }
  TensorMap map(int columns = kSize) const { return map_of(bits.data(), rows, columns); }
  // The rows are those of `map()`, kSize further down.
  TensorMap shifted_map() const {
    TensorMap map = map_of(bits.data() - kSize * kSize, rows + kSize);
    DecodedMap decoded = decode(map);
    decoded.tensor = bits.data();
    std::memcpy(static_cast<void*>(&map), &decoded, sizeof decoded);
    return map;
  }
  static TensorMap map_of(const uint16_t* data, int rows, int columns = kSize) {
    return make_tensor_map({data, 1, 1, rows, columns, 0, 0, kSize, false, kSize});
  }
};

bool right(const Matrix& a, const Matrix& b, const Matrix& out) {
  for (int i = 0; i < kSize; ++i) {
    for (int j = 0; j < kSize; ++j) {
      double sum = 0;
      for (int step = 0; step < kSteps; ++step) {
        for (int k = 0; k < kSize; ++k) {
          sum += double{a.at(step * kSize + i, k)} * b.at(step * kSize + j, k);
          if (k < 16) sum += b.at(step * kSize + j, k);  // the operand of ones
        }
      }
      if (!(std::fabs(out.at(i, j) - sum) <= 0.01 * std::fabs(sum) + 0.01)) return false;
    }
  }
  return true;
}

// What was added is twice what was stored, but for the rounding of `out`.
bool right(const Matrix& out, const float (&added)[4 * kPiece]) {
  for (int i = 0; i < 4 * kPiece; ++i) {
    const int thread = i / 4, r = i % 4;
    const attention::Fragment fragment(thread);
    const float expected = 2 * out.at(fragment.row + r / 2 * 8, fragment.column + r % 2);
    if (!(std::fabs(added[i] - expected) <= 0.01f * std::fabs(expected) + 0.01f)) return false;
  }
  return true;
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Named& named : kFaults) names.emplace_back(named.name);
  return names;
}

std::vector<std::string> run_fault(const std::string& name, uint64_t seed) {
  for (const Named& named : kFaults) {
    if (name != named.name) continue;
    const Matrix a(kSteps * kSize, true), b(kSteps * kSize + 1, true), out(kSize, false);
    alignas(16) float added[4 * kPiece] = {};
    const Maps maps{a.map(), Matrix::map_of(b.bits.data(), kSteps * kSize),
                    out.map(named.fault == Fault::kPartialPiece ? kSize - 4 : kSize),
                    a.shifted_map(), added};
    Launch launch;
    launch.threads = kThreads;
    launch.shared_bytes = kSharedBytes;
    launch.registers_per_thread = 128;
    launch.seed = seed;
    const Report report = Machine::instance().run(launch, [&] { fault_kernel(maps, named.fault); });
    if (report.faults.empty() && !(right(a, b, out) && right(out, added))) return {"wrong result"};
    return report.faults;
  }
  throw std::invalid_argument("no such fault: " + name);
}

}  // namespace fused_attn::emulator
