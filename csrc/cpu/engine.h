// What the matrix products of a kernel are made of. Both operands of a product are counted in
// "units": one number, or a pair of bfloat16 that one instruction multiplies and adds up. kTiles
// says whether there are instructions for tiles of them (cpu/tiles_amx.h).
#pragma once

#include "common/float16.h"
#include "cpu/kernel_dtypes.h"
#include "cpu/vec.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// float32, and the 16-bit types after conversion.
struct EngineF32 {
  using Element = float;
  using Unit = float;
  using Real = float;
  static constexpr int kPair = 1;
  static constexpr Precision kPrecision = Precision::kFull;
  static constexpr bool kTiles = false;
  static FUSED_ATTN_INLINE VecF dot(VecF a, VecF b, VecF acc) { return fma(a, b, acc); }
};

struct EngineF64 {
  using Element = double;
  using Unit = double;
  using Real = double;
  static constexpr int kPair = 1;
  static constexpr Precision kPrecision = Precision::kFull;
  static constexpr bool kTiles = false;
  static FUSED_ATTN_INLINE Vec<double> dot(Vec<double> a, Vec<double> b, Vec<double> acc) {
    return fma(a, b, acc);
  }
};

#if FUSED_ATTN_BF16_DOT
// bfloat16 with the dot product instruction; sums in float32.
struct EngineBF16 {
  using Element = BFloat16;
  using Unit = uint32_t;
  using Real = float;
  static constexpr int kPair = 2;
  static constexpr Precision kPrecision = Precision::kHalf;
  static constexpr bool kTiles = FUSED_ATTN_BF16_TILES;
  static FUSED_ATTN_INLINE VecF dot(VecU a, VecU b, VecF acc) { return dot_pairs(a, b, acc); }
};
#endif

template <class E>
constexpr int64_t units(int64_t elements) {
  return (elements + E::kPair - 1) / E::kPair;
}

// std::min and std::max would leave shared out-of-line copies behind (see common/macros.h).
template <class T>
FUSED_ATTN_INLINE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
FUSED_ATTN_INLINE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
FUSED_ATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Runs `call` with the engine of problems of this dtype, which this level has kernels for.
template <class Call>
FUSED_ATTN_INLINE void with_engine(DType dtype, const Call& call) {
  if constexpr (has_kernels(DType::kFloat64)) {
    if (dtype == DType::kFloat64) return call(EngineF64{});
  }
#if FUSED_ATTN_BF16_DOT
  static_assert(!has_kernels(DType::kFloat32) && !has_kernels(DType::kFloat16));
  call(EngineBF16{});
#else
  call(EngineF32{});
#endif
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
