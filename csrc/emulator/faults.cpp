// Plants one mistake after the other in a small kernel (fault_kernel.h). What the emulator says of
// each is tested; a judge that lets one pass would prove nothing about the real kernels.
#include "emulator/faults.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda/launch.h"
#include "emulator/encoder.h"
#include "emulator/fault_kernel.h"

namespace fused_attn::emulator {
namespace {

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
    {"one lane waits", Fault::kOneLaneWaits},
    {"load skipped", Fault::kLoadSkipped},
    {"visit skipped", Fault::kVisitSkipped},
    {"one arrival", Fault::kOneArrival},
    {"unordered load", Fault::kUnorderedLoad},
    {"unordered store", Fault::kUnorderedStore},
    {"unordered copy", Fault::kUnorderedCopy},
    {"unordered product", Fault::kUnorderedProduct},
    {"no init fence", Fault::kNoInitFence},
    {"no init barrier", Fault::kNoInitBarrier},
    {"two blocks", Fault::kTwoBlocks},
    {"two blocks add", Fault::kTwoBlocksAdd},
    {"partial piece", Fault::kPartialPiece},
    {"shifted map", Fault::kShiftedMap},
};

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
    float of_blocks[2] = {};
    const Maps maps{a.map(),
                    Matrix::map_of(b.bits.data(), kSteps * kSize),
                    out.map(named.fault == Fault::kPartialPiece ? kSize - 4 : kSize),
                    a.shifted_map(),
                    added,
                    of_blocks};
    Launch launch;
    launch.threads = kThreads;
    launch.shared_bytes = kSharedBytes;
    launch.registers_per_thread = 128;
    launch.seed = seed;
    Machine& machine = Machine::instance();
    machine.global_writes.reset();
    Report report = machine.run(launch, [&] { fault_kernel(maps, named.fault); });
    launch.block = 1;
    const Report second = machine.run(launch, [&] { fault_kernel(maps, named.fault); });
    report.faults.insert(report.faults.end(), second.faults.begin(), second.faults.end());
    if (report.faults.empty() && !(right(a, b, out) && right(out, added))) return {"wrong result"};
    return report.faults;
  }
  throw std::invalid_argument("no such fault: " + name);
}

}  // namespace fused_attn::emulator
