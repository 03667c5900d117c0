// Functions that machine code (attention/functions.h) calls on a few numbers, where a formula of
// its own would not give what the interpreter gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/float16.h"

namespace fused_attn::attention {

// f(a, b, out, n), with b for powers alone; n numbers each.
template <class Real, class Function>
inline void call_each(const Real* a, const Real* b, Real* out, int64_t n, Function function) {
  for (int64_t i = 0; i < n; ++i) out[i] = function(a[i], b[i]);
}

// clang-format off
#define FUSED_ATTN_MACHINE_CALLS(X)                                                         \
  X(pow, std::pow(a, b)) X(log, std::log(a)) X(log1p, std::log1p(a))                        \
  X(expm1, std::expm1(a)) X(sin, std::sin(a)) X(cos, std::cos(a)) X(tanh, std::tanh(a))     \
  X(erf, std::erf(a)) X(floor, std::floor(a)) X(ceil, std::ceil(a)) X(trunc, std::trunc(a))
// clang-format on

#define FUSED_ATTN_CALL(name, formula)                                                \
  template <class Real>                                                               \
  void call_##name(const Real* a, const Real* b, Real* out, int64_t n) {              \
    call_each(a, b, out, n, [](Real a, [[maybe_unused]] Real b) { return formula; }); \
  }
FUSED_ATTN_MACHINE_CALLS(FUSED_ATTN_CALL)
#undef FUSED_ATTN_CALL

inline void call_half(const Float16* a, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(a[i]);
}

// A function's addresses, for float32 and float64.
struct MachineCall {
  const char* name;
  uintptr_t single, wide;
};

inline std::vector<MachineCall> machine_calls() {
  const auto address = [](auto* function) { return reinterpret_cast<uintptr_t>(function); };
  return {
#define FUSED_ATTN_CALL(name, formula) \
  {#name, address(&call_##name<float>), address(&call_##name<double>)},
      FUSED_ATTN_MACHINE_CALLS(FUSED_ATTN_CALL)
#undef FUSED_ATTN_CALL
          {"half", address(&call_half), address(&call_half)}};
}

}  // namespace fused_attn::attention
