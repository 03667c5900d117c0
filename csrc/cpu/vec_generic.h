// Vec<T> out of the compiler's own vector extension (or plain scalars where there is none).
// It is every type of the portable level and Vec<double> of all levels. What only the portable
// level has this way is in cpu/vec_portable.h.
#pragma once

#include <cmath>

#include "common/float16.h"
#include "common/macros.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

constexpr int kNativeBytes = FUSED_ATTN_VECTOR_BYTES;

// Does fma() round once, in all types?
#if defined(__FP_FAST_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

template <class T>
struct Native;
#if defined(__GNUC__)
#define FUSED_ATTN_NATIVE(T)                                   \
  template <>                                                  \
  struct Native<T> {                                           \
    typedef T type __attribute__((vector_size(kNativeBytes))); \
  }
#else
#define FUSED_ATTN_NATIVE(T) \
  template <>                \
  struct Native<T> {         \
    typedef T type;          \
  }
#endif
FUSED_ATTN_NATIVE(float);
FUSED_ATTN_NATIVE(double);
FUSED_ATTN_NATIVE(uint32_t);
FUSED_ATTN_NATIVE(uint64_t);
#undef FUSED_ATTN_NATIVE

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <class T>
struct Vec {
  using Part = typename Native<T>::type;
  static constexpr int kParts = 16 * sizeof(T) / sizeof(Part);
  static constexpr int kPartLanes = 16 / kParts;
  Part part[kParts];

  static FUSED_ATTN_INLINE Vec zero() { return set1(T(0)); }
  static FUSED_ATTN_INLINE Vec set1(T x) {
    Vec v;
    FUSED_ATTN_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] = x - Part{};  // minus keeps the sign of -0
    return v;
  }
  static FUSED_ATTN_INLINE Vec load(const T* from) {
    Vec v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static FUSED_ATTN_INLINE Vec load(const T* from, int n) {
    Vec v = zero();
    std::memcpy(&v, from, sizeof(T) * static_cast<size_t>(n));
    return v;
  }
  FUSED_ATTN_INLINE void store(T* to) const { std::memcpy(to, this, sizeof(*this)); }
  FUSED_ATTN_INLINE void store(T* to, int n) const {
    std::memcpy(to, this, sizeof(T) * static_cast<size_t>(n));
  }
};

#define FUSED_ATTN_LANEWISE(expression)                              \
  Vec<T> c;                                                          \
  FUSED_ATTN_UNROLL                                                  \
  for (int p = 0; p < Vec<T>::kParts; ++p) c.part[p] = (expression); \
  return c

template <class T>
FUSED_ATTN_INLINE Vec<T> operator+(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] + b.part[p]);
}
template <class T>
FUSED_ATTN_INLINE Vec<T> operator-(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] - b.part[p]);
}
template <class T>
FUSED_ATTN_INLINE Vec<T> operator*(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] * b.part[p]);
}
template <class T>
FUSED_ATTN_INLINE Vec<T> operator/(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] / b.part[p]);
}
template <class T>
FUSED_ATTN_INLINE Vec<T> operator^(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] ^ b.part[p]);
}
// a * b + c, in one rounding where the level has such an instruction.
template <class T>
FUSED_ATTN_INLINE Vec<T> fma(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  return a * b + c;
}
template <class T>
FUSED_ATTN_INLINE Vec<T> max(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] > b.part[p] ? a.part[p] : b.part[p]);
}
template <class T>
FUSED_ATTN_INLINE Vec<T> min(const Vec<T>& a, const Vec<T>& b) {
  FUSED_ATTN_LANEWISE(a.part[p] < b.part[p] ? a.part[p] : b.part[p]);
}
#undef FUSED_ATTN_LANEWISE

template <class T>
FUSED_ATTN_INLINE Vec<T> abs(const Vec<T>& a) {
  return max(a, Vec<T>::zero() - a);
}

template <class T, class Function>
FUSED_ATTN_INLINE Vec<T> map_lanes(const Vec<T>& a, Function function) {
  alignas(64) T lanes[16];
  a.store(lanes);
  for (int i = 0; i < 16; ++i) lanes[i] = function(lanes[i]);
  return Vec<T>::load(lanes);
}

template <class T>
FUSED_ATTN_INLINE Vec<T> sqrt(const Vec<T>& a) {
  return map_lanes(a, [](T x) { return std::sqrt(x); });
}

template <class T>
FUSED_ATTN_INLINE T sum(const Vec<T>& a) {
  alignas(64) T lanes[16];
  a.store(lanes);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// The largest lane.
template <class T>
FUSED_ATTN_INLINE T largest(const Vec<T>& a) {
  alignas(64) T lanes[16];
  a.store(lanes);
  for (int i = 1; i < 16; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

template <class T>
FUSED_ATTN_INLINE Vec<T> select(Mask mask, const Vec<T>& a, const Vec<T>& b) {
  alignas(64) T x[16], y[16];
  a.store(x);
  b.store(y);
  for (int i = 0; i < 16; ++i) x[i] = (mask >> i & 1) ? x[i] : y[i];
  return Vec<T>::load(x);
}

template <class T>
FUSED_ATTN_INLINE Mask greater(const Vec<T>& a, const Vec<T>& b) {
  alignas(64) T x[16], y[16];
  a.store(x);
  b.store(y);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= unsigned(x[i] > y[i]) << i;
  return static_cast<Mask>(mask);
}

// To the nearest integer. Adding and taking away 1.5 * 2^mantissa leaves no room for a fraction;
// numbers too large for that (they never matter to exp2) come back nearly unchanged.
template <class T>
FUSED_ATTN_INLINE Vec<T> round(const Vec<T>& a) {
  const auto magic = Vec<T>::set1(static_cast<T>(uint64_t{3} << (BitsOf<T>::kMantissa - 1)));
  return (a + magic) - magic;
}

// a * 2^n for integral n; results below the smallest normal number become 0.
template <class T>
FUSED_ATTN_INLINE Vec<T> scale2(const Vec<T>& a, const Vec<T>& n) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kMantissa = BitsOf<T>::kMantissa, kBias = BitsOf<T>::kBias;
  const auto low = Vec<T>::set1(T(-kBias)), high = Vec<T>::set1(T(kBias + 1));
  const auto biased =
      min(max(n, low), high) + Vec<T>::set1(static_cast<T>((uint64_t{1} << kMantissa) + kBias));
  Vec<Bits> bits;
  std::memcpy(&bits, &biased, sizeof(bits));
  for (int p = 0; p < Vec<T>::kParts; ++p) bits.part[p] = bits.part[p] << kMantissa;
  Vec<T> power;
  std::memcpy(&power, &bits, sizeof(power));
  return a * power;
}

template <class T>
FUSED_ATTN_INLINE void transpose(Vec<T> (&rows)[16]) {
  alignas(64) T from[16][16], to[16][16];
  for (int i = 0; i < 16; ++i) rows[i].store(from[i]);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
  }
  for (int i = 0; i < 16; ++i) rows[i] = Vec<T>::load(to[i]);
}

// Lane i of the result is the sum of rows[i].
template <class T>
FUSED_ATTN_INLINE Vec<T> sum_each(const Vec<T> (&rows)[16]) {
  alignas(64) T sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = sum(rows[i]);
  return Vec<T>::load(sums);
}

FUSED_ATTN_INLINE Vec<double> load(const double* from) {
  return Vec<double>::load(from);
}
FUSED_ATTN_INLINE Vec<double> load(const double* from, int n) {
  return Vec<double>::load(from, n);
}
FUSED_ATTN_INLINE void store(double* to, const Vec<double>& v) {
  v.store(to);
}
FUSED_ATTN_INLINE void store(double* to, const Vec<double>& v, int n) {
  v.store(to, n);
}
FUSED_ATTN_INLINE void stream(double* to, const Vec<double>& v) {
  v.store(to);
}

// 1 / a, where a level has no cheaper estimate.
template <class T>
FUSED_ATTN_INLINE Vec<T> reciprocal_estimate(const Vec<T>& a) {
  return Vec<T>::set1(T(1)) / a;
}

// Bits of the lanes where a >= b, as unsigned numbers.
template <class T>
FUSED_ATTN_INLINE Mask not_below(const Vec<T>& a, const Vec<T>& b) {
  return static_cast<Mask>(~unsigned(greater(b, a)));
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
