// The vector vocabulary of the CPU kernels: Vec<T> has 16 lanes on every level (one 512-bit
// register, two of 256 bits, or what the compiler makes of it), so kernels are written once.
//
//   Vec<T>::zero() set1(x) load(p) load(p, n), v.store(p) v.store(p, n)   T: float double uint32_t
//   load(p), load(p, n), store(p, v), store(p, v, n)   the same, and for BFloat16 and Float16 in
//       memory, converted (round to nearest even); n: the first n lanes only, the rest is 0
//   stream(p, v), stream_fence()   stores past the caches; p aligned to a vector
//   store_rounded(p, v, streamed)   to 16 bits, either way; returns v as it would come back
//   + - * / fma max min abs sqrt sum sum_each largest round exp2 exp log tanh select greater
//   transpose reciprocal_estimate (at least 14 bits of 1 / x)
//
// max(a, b) and min(a, b) give b where either is NaN. Nothing here may be included by a file that
// is not compiled per level (see cpu/level.h). Intrinsics stand in the header of a level's vectors
// (cpu/levels.h) and nowhere else.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

#if !defined(FUSED_ATTN_LEVEL)
#error "vec.h is for sources compiled once per instruction-set level: see csrc/cpu/levels.cmake"
#endif

namespace fused_attn::FUSED_ATTN_LEVEL {
constexpr int kLanes = 16;
using Mask = uint16_t;  // one bit per lane

// How many Vec<T> the registers hold.
template <class T>
constexpr int kRegisterVectors =
    FUSED_ATTN_VECTOR_REGISTERS * FUSED_ATTN_VECTOR_BYTES / (kLanes * int{sizeof(T)});
}  // namespace fused_attn::FUSED_ATTN_LEVEL

#include FUSED_ATTN_VECTOR_HEADER

namespace fused_attn::FUSED_ATTN_LEVEL {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.6931471805599453094;

// How many correct bits a result is worth: fewer when it is about to be rounded to 16 bits.
enum class Precision { kFull, kHalf };

// 1 / x.
template <Precision kPrecision, class T>
FUSED_ATTN_INLINE Vec<T> reciprocal(Vec<T> x) {
  if constexpr (kPrecision == Precision::kHalf) return reciprocal_estimate(x);
  return Vec<T>::set1(T(1)) / x;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <class T, int kTerms>
FUSED_ATTN_INLINE Vec<T> polynomial(const T (&c)[kTerms], Vec<T> x) {
  Vec<T> y = Vec<T>::set1(c[kTerms - 1]);
  FUSED_ATTN_UNROLL
  for (int i = kTerms - 2; i >= 0; --i) y = fma(y, x, Vec<T>::set1(c[i]));
  return y;
}

// 2^x for x in [-0.5, 0.5], exactly 1 at 0. Minimax polynomials of the relative error: 4e-9 (full,
// a fifteenth of float32's rounding error) and 3e-6 (half).
template <Precision kPrecision>
FUSED_ATTN_INLINE VecF exp2_fraction(VecF r) {
  constexpr float kFull[] = {1.0f,          0.6931472f,    0.24022648f,   0.055503325f,
                             0.0096184374f, 0.0013398874f, 0.00015353362f};
  constexpr float kHalf[] = {1.0f, 0.69312419f, 0.24024099f, 0.055906425f, 0.0095828529f};
  if constexpr (kPrecision == Precision::kFull) return polynomial(kFull, r);
  return polynomial(kHalf, r);
}

// The Taylor series of e^(r ln 2); its remainder is below 1e-17 for |r| <= 0.5.
template <Precision>
FUSED_ATTN_INLINE Vec<double> exp2_fraction(Vec<double> r) {
  constexpr double kTaylor[] = {1.0,
                                1.0,
                                1.0 / 2,
                                1.0 / 6,
                                1.0 / 24,
                                1.0 / 120,
                                1.0 / 720,
                                1.0 / 5040,
                                1.0 / 40320,
                                1.0 / 362880,
                                1.0 / 3628800,
                                1.0 / 39916800,
                                1.0 / 479001600,
                                1.0 / 6227020800.0};
  return polynomial(kTaylor, r * Vec<double>::set1(kLn2));
}

// 2^x. x must not be -inf; a very negative finite x gives 0.
template <Precision kPrecision = Precision::kFull, class T>
FUSED_ATTN_INLINE Vec<T> exp2(Vec<T> x) {
  const Vec<T> n = round(x);
  return scale2(exp2_fraction<kPrecision>(x - n), n);
}

// e^x. x must not be -inf. The product with log2(e) is not rounded before its fraction is taken.
template <Precision kPrecision = Precision::kFull, class T>
FUSED_ATTN_INLINE Vec<T> exp(Vec<T> x) {
  const Vec<T> log2e = Vec<T>::set1(static_cast<T>(kLog2e));
  const Vec<T> n = round(x * log2e);
  return scale2(exp2_fraction<kPrecision>(fma(x, log2e, Vec<T>::zero() - n)), n);
}

// tanh(x): x + x^3 Q(x^2) near 0, where 1 - 2 / (e^2x + 1) would cancel.
FUSED_ATTN_INLINE VecF tanh(VecF x) {
  constexpr float kSmall[] = {-0.33333284f, 0.13331491f, -0.053743498f, 0.020650587f,
                              -0.0057170445f};
  const VecF one = VecF::set1(1.0f), magnitude = abs(x), square = x * x;
  const VecF small = fma(x * square, polynomial(kSmall, square), x);
  // Beyond 10 the result is 1 in float32; the clamp keeps e^2x finite.
  const VecF e = exp(min(VecF::set1(10.0f), magnitude) * VecF::set1(2.0f));
  const VecF large = one - VecF::set1(2.0f) / (e + one);
  const VecF signed_large = select(greater(VecF::zero(), x), VecF::zero() - large, large);
  return select(greater(magnitude, VecF::set1(0.625f)), signed_large, small);
}
FUSED_ATTN_INLINE Vec<double> tanh(Vec<double> x) {
  return map_lanes(x, [](double a) { return std::tanh(a); });
}

// The natural logarithm. Used on a few numbers per row, so the libm function is fast enough.
template <class T>
FUSED_ATTN_INLINE Vec<T> log(Vec<T> x) {
  alignas(64) T lanes[16];
  x.store(lanes);
  for (int i = 0; i < 16; ++i) lanes[i] = std::log(lanes[i]);
  return Vec<T>::load(lanes);
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
