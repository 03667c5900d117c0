// Compiled once per instruction-set level; see peak.h.
#include "cpu/peak_kernel.h"

#include "cpu/engine.h"
#if FUSED_ATTN_BF16_TILES
#include "cpu/tiles_amx.h"
#endif

namespace fused_attn::FUSED_ATTN_LEVEL {
namespace {

volatile double sink;  // keeps the compiler from leaving the work out

// Chains of multiply-adds: twelve registers hide a latency of four or five cycles at two a cycle,
// and leave some for the operands; an accumulator that is spilled would be timed, too.
template <class Real>
constexpr int kAccumulators = smaller(12, larger(1, kRegisterVectors<Real> * 3 / 4));

template <class E>
double run(int64_t repeats) {
#if FUSED_ATTN_BF16_TILES
  if (E::kTiles) return multiply_tiles_only(repeats);
#endif
  using Real = typename E::Real;
  using Unit = typename E::Unit;
  constexpr int kChains = kAccumulators<Real>;
  static volatile Unit source = Unit(0);  // keeps the compiler from knowing the result
  const auto a = Vec<Unit>::set1(source), b = Vec<Unit>::set1(source);
  Vec<Real> acc[kChains];
  for (auto& x : acc) x = Vec<Real>::zero();
  for (int64_t i = 0; i < repeats; ++i) {
    FUSED_ATTN_UNROLL
    for (int j = 0; j < kChains; ++j) acc[j] = E::dot(a, b, acc[j]);
  }
  Vec<Real> total = acc[0];
  for (int j = 1; j < kChains; ++j) total = total + acc[j];
  sink = sum(total);
  return 2.0 * E::kPair * kLanes * kChains * static_cast<double>(repeats);
}

}  // namespace

double multiply_adds(DType dtype, int64_t repeats) {
  double operations = 0;
  with_engine(dtype, [&](auto engine) { operations = run<decltype(engine)>(repeats); });
  return operations;
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
