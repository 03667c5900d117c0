// Vec<float> and Vec<uint32_t> as two 256-bit registers (level avx2).
#pragma once

#include <immintrin.h>

#include "cpu/vec_generic.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// All bits set in lane i of the result where bit i of `bits` is set.
FUSED_ATTN_INLINE __m256i expand_mask(unsigned bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane),
                            lane);
}
FUSED_ATTN_INLINE unsigned first_lanes(int n) {
  return (1u << n) - 1u;
}

template <>
struct Vec<float> {
  __m256 lo, hi;

  static FUSED_ATTN_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static FUSED_ATTN_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static FUSED_ATTN_INLINE Vec load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  static FUSED_ATTN_INLINE Vec load(const float* from, int n) {
    const unsigned mask = first_lanes(n);
    return {_mm256_maskload_ps(from, expand_mask(mask)),
            _mm256_maskload_ps(from + 8, expand_mask(mask >> 8))};
  }
  FUSED_ATTN_INLINE void store(float* to) const {
    _mm256_storeu_ps(to, lo);
    _mm256_storeu_ps(to + 8, hi);
  }
  FUSED_ATTN_INLINE void store(float* to, int n) const {
    const unsigned mask = first_lanes(n);
    _mm256_maskstore_ps(to, expand_mask(mask), lo);
    _mm256_maskstore_ps(to + 8, expand_mask(mask >> 8), hi);
  }
};

template <>
struct Vec<uint32_t> {
  __m256i lo, hi;

  static FUSED_ATTN_INLINE Vec zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static FUSED_ATTN_INLINE Vec set1(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
  }
  static FUSED_ATTN_INLINE Vec load(const uint32_t* from) {
    const auto* p = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
  }
  FUSED_ATTN_INLINE void store(uint32_t* to) const {
    auto* p = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(p, lo);
    _mm256_storeu_si256(p + 1, hi);
  }
};

using VecF = Vec<float>;
using VecU = Vec<uint32_t>;

FUSED_ATTN_INLINE VecF operator+(VecF a, VecF b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF operator-(VecF a, VecF b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF operator*(VecF a, VecF b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF operator/(VecF a, VecF b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FUSED_ATTN_INLINE VecF max(VecF a, VecF b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF min(VecF a, VecF b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF abs(VecF a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
FUSED_ATTN_INLINE VecF sqrt(VecF a) {
  return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)};
}
FUSED_ATTN_INLINE float sum(VecF a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
FUSED_ATTN_INLINE float largest(VecF a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
FUSED_ATTN_INLINE VecF select(Mask mask, VecF a, VecF b) {
  const __m256 lo = _mm256_castsi256_ps(expand_mask(mask));
  const __m256 hi = _mm256_castsi256_ps(expand_mask(mask >> 8));
  return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}
FUSED_ATTN_INLINE Mask greater(VecF a, VecF b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
  return static_cast<Mask>(lo | hi << 8);
}
FUSED_ATTN_INLINE VecF round(VecF a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
FUSED_ATTN_INLINE __m256 power_of_2(__m256 n) {
  const __m256 clamped =
      _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(128.0f));
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(clamped), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// a * 2^n for integral n; results below the smallest normal number become 0.
FUSED_ATTN_INLINE VecF scale2(VecF a, VecF n) {
  return {_mm256_mul_ps(a.lo, power_of_2(n.lo)), _mm256_mul_ps(a.hi, power_of_2(n.hi))};
}

FUSED_ATTN_INLINE VecU operator+(VecU a, VecU b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecU operator^(VecU a, VecU b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
FUSED_ATTN_INLINE VecF from_int_bits(VecU a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
FUSED_ATTN_INLINE unsigned not_below(__m256i a, __m256i b) {
  const __m256i equal = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
}
FUSED_ATTN_INLINE Mask not_below(VecU a, VecU b) {
  return static_cast<Mask>(not_below(a.lo, b.lo) | not_below(a.hi, b.hi) << 8);
}

FUSED_ATTN_INLINE __m256i multiply_high(__m256i a, __m256i factor) {
  const __m256i even = _mm256_mul_epu32(a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
FUSED_ATTN_INLINE void multiply_wide(VecU a, uint32_t b, VecU& low, VecU& high) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  low = {_mm256_mullo_epi32(a.lo, factor), _mm256_mullo_epi32(a.hi, factor)};
  high = {multiply_high(a.lo, factor), multiply_high(a.hi, factor)};
}

FUSED_ATTN_INLINE __m256 widen(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FUSED_ATTN_INLINE __m256 widen(__m128i bits, Float16) {
  return _mm256_cvtph_ps(bits);
}

template <class S>
FUSED_ATTN_INLINE VecF widen(__m256i bits, S) {
  return {widen(_mm256_castsi256_si128(bits), S{}), widen(_mm256_extracti128_si256(bits, 1), S{})};
}

FUSED_ATTN_INLINE __m256i narrow(VecF a, Float16) {
  return _mm256_setr_m128i(_mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT),
                           _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

// The upper half of each number, rounded to nearest even: wrong for some NaNs.
FUSED_ATTN_INLINE __m256i upper_halves(__m256i bits) {
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}
FUSED_ATTN_INLINE __m256i upper_halves_of_any(__m256 a) {
  const __m256i quiet =
      _mm256_srli_epi32(_mm256_or_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x400000)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(upper_halves(_mm256_castps_si256(a)), quiet, nan);
}
FUSED_ATTN_INLINE __m256i narrow(VecF a, BFloat16) {
  __m256i lo = upper_halves(_mm256_castps_si256(a.lo));
  __m256i hi = upper_halves(_mm256_castps_si256(a.hi));
  // One comparison asks both halves. A branch, because NaNs are rare and the blends a third of it.
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, a.hi, _CMP_UNORD_Q)) != 0, 0)) {
    lo = upper_halves_of_any(a.lo);
    hi = upper_halves_of_any(a.hi);
  }
  // Packing goes by halves of a register: put the four quarters in order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}

FUSED_ATTN_INLINE VecF load(const float* from) {
  return VecF::load(from);
}
FUSED_ATTN_INLINE VecF load(const float* from, int n) {
  return VecF::load(from, n);
}
FUSED_ATTN_INLINE void store(float* to, VecF v) {
  v.store(to);
}
FUSED_ATTN_INLINE void store(float* to, VecF v, int n) {
  v.store(to, n);
}

template <class S>
FUSED_ATTN_INLINE VecF load(const S* from) {
  const auto* p = reinterpret_cast<const __m128i*>(from);
  return {widen(_mm_loadu_si128(p), S{}), widen(_mm_loadu_si128(p + 1), S{})};
}
template <class S>
FUSED_ATTN_INLINE VecF load(const S* from, int n) {
  alignas(32) S lanes[16] = {};
  std::memcpy(lanes, from, sizeof(S) * static_cast<size_t>(n));
  return load(lanes);
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(v, S{}));
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v, int n) {
  alignas(32) S lanes[16];
  store(lanes, v);
  std::memcpy(to, lanes, sizeof(S) * static_cast<size_t>(n));
}

FUSED_ATTN_INLINE void stream(float* to, VecF v) {
  _mm256_stream_ps(to, v.lo);
  _mm256_stream_ps(to + 8, v.hi);
}
template <class S>
FUSED_ATTN_INLINE void stream(S* to, VecF v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), narrow(v, S{}));
}
FUSED_ATTN_INLINE void stream_fence() {
  _mm_sfence();
}

template <class S>
FUSED_ATTN_INLINE VecF store_rounded(S* to, VecF v, bool streamed) {
  const __m256i bits = narrow(v, S{});
  if (streamed) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }
  return widen(bits, S{});
}

// Bit i of the result: is byte i of n <= 64 non-zero?
FUSED_ATTN_INLINE uint64_t nonzero_bytes(const uint8_t* from, int n) {
  alignas(32) uint8_t bytes[64] = {};
  std::memcpy(bytes, from, static_cast<size_t>(n));
  const auto* p = reinterpret_cast<const __m256i*>(bytes);
  const __m256i zero = _mm256_setzero_si256();
  const uint32_t lo = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_load_si256(p), zero));
  const uint32_t hi = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_load_si256(p + 1), zero));
  return ~(uint64_t{hi} << 32 | lo);
}

// Transposes the 8 x 8 block of eight registers.
FUSED_ATTN_INLINE void transpose8(__m256 (&r)[8]) {
  __m256 a[8], b[8];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

FUSED_ATTN_INLINE void transpose(VecF (&rows)[16]) {
  __m256 block[4][8];  // top left, top right, bottom left, bottom right
  for (int i = 0; i < 8; ++i) {
    block[0][i] = rows[i].lo;
    block[1][i] = rows[i].hi;
    block[2][i] = rows[i + 8].lo;
    block[3][i] = rows[i + 8].hi;
  }
  for (auto& b : block) transpose8(b);
  for (int i = 0; i < 8; ++i) {
    rows[i] = {block[0][i], block[2][i]};
    rows[i + 8] = {block[1][i], block[3][i]};
  }
}

// The sum of each of eight vectors.
FUSED_ATTN_INLINE __m256 sum_each(const __m256 (&x)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}

// Lane i of the result is the sum of rows[i].
FUSED_ATTN_INLINE VecF sum_each(const VecF (&rows)[16]) {
  __m256 lo[8], hi[8];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 8; ++i) {
    lo[i] = _mm256_add_ps(rows[i].lo, rows[i].hi);
    hi[i] = _mm256_add_ps(rows[i + 8].lo, rows[i + 8].hi);
  }
  return {sum_each(lo), sum_each(hi)};
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
