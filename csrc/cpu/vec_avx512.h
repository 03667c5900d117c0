// Vec<float> and Vec<uint32_t> as one 512-bit register (levels avx512 and avx512_bf16).
#pragma once

#include <immintrin.h>

#include "cpu/vec_generic.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

FUSED_ATTN_INLINE Mask first_lanes(int n) {
  return static_cast<Mask>((1u << n) - 1u);
}

template <>
struct Vec<float> {
  __m512 v;

  static FUSED_ATTN_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static FUSED_ATTN_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static FUSED_ATTN_INLINE Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static FUSED_ATTN_INLINE Vec load(const float* from, int n) {
    return {_mm512_maskz_loadu_ps(first_lanes(n), from)};
  }
  FUSED_ATTN_INLINE void store(float* to) const { _mm512_storeu_ps(to, v); }
  FUSED_ATTN_INLINE void store(float* to, int n) const {
    _mm512_mask_storeu_ps(to, first_lanes(n), v);
  }
};

template <>
struct Vec<uint32_t> {
  __m512i v;

  static FUSED_ATTN_INLINE Vec zero() { return {_mm512_setzero_si512()}; }
  static FUSED_ATTN_INLINE Vec set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static FUSED_ATTN_INLINE Vec load(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
  static FUSED_ATTN_INLINE Vec load(const uint32_t* from, int n) {
    return {_mm512_maskz_loadu_epi32(first_lanes(n), from)};
  }
  FUSED_ATTN_INLINE void store(uint32_t* to) const { _mm512_storeu_si512(to, v); }
  FUSED_ATTN_INLINE void store(uint32_t* to, int n) const {
    _mm512_mask_storeu_epi32(to, first_lanes(n), v);
  }
};

using VecF = Vec<float>;
using VecU = Vec<uint32_t>;

FUSED_ATTN_INLINE VecF operator+(VecF a, VecF b) {
  return {_mm512_add_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF operator-(VecF a, VecF b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF operator*(VecF a, VecF b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF operator/(VecF a, VecF b) {
  return {_mm512_div_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
FUSED_ATTN_INLINE VecF max(VecF a, VecF b) {
  return {_mm512_max_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF min(VecF a, VecF b) {
  return {_mm512_min_ps(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF abs(VecF a) {
  return {_mm512_abs_ps(a.v)};
}
// 1 / a with 14 correct bits.
FUSED_ATTN_INLINE VecF reciprocal_estimate(VecF a) {
  return {_mm512_rcp14_ps(a.v)};
}
FUSED_ATTN_INLINE VecF sqrt(VecF a) {
  return {_mm512_sqrt_ps(a.v)};
}
FUSED_ATTN_INLINE float sum(VecF a) {
  return _mm512_reduce_add_ps(a.v);
}
FUSED_ATTN_INLINE float largest(VecF a) {
  return _mm512_reduce_max_ps(a.v);
}
FUSED_ATTN_INLINE VecF select(Mask mask, VecF a, VecF b) {
  return {_mm512_mask_blend_ps(mask, b.v, a.v)};
}
FUSED_ATTN_INLINE Mask greater(VecF a, VecF b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
FUSED_ATTN_INLINE VecF round(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FUSED_ATTN_INLINE VecF scale2(VecF a, VecF n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

FUSED_ATTN_INLINE VecU operator+(VecU a, VecU b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
FUSED_ATTN_INLINE VecU operator^(VecU a, VecU b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
FUSED_ATTN_INLINE VecF from_int_bits(VecU a) {
  return {_mm512_castsi512_ps(a.v)};
}
FUSED_ATTN_INLINE Mask not_below(VecU a, VecU b) {
  return _mm512_cmpge_epu32_mask(a.v, b.v);
}

FUSED_ATTN_INLINE void multiply_wide(VecU a, uint32_t b, VecU& low, VecU& high) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  low.v = _mm512_mullo_epi32(a.v, factor);
  high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

FUSED_ATTN_INLINE VecF widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FUSED_ATTN_INLINE VecF widen(__m256i bits, Float16) {
  return {_mm512_cvtph_ps(bits)};
}

FUSED_ATTN_INLINE __m256i narrow(VecF a, Float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FUSED_ATTN_INLINE __m256i narrow(VecF a, BFloat16) {
#if FUSED_ATTN_BF16_DOT
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const Mask nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
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
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), S{});
}
template <class S>
FUSED_ATTN_INLINE VecF load(const S* from, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), from), S{});
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(v, S{}));
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v, int n) {
  _mm256_mask_storeu_epi16(to, first_lanes(n), narrow(v, S{}));
}

FUSED_ATTN_INLINE void stream(float* to, VecF v) {
  _mm512_stream_ps(to, v.v);
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
  const __mmask64 valid = n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  const __m512i bytes = _mm512_maskz_loadu_epi8(valid, from);
  return _mm512_test_epi8_mask(bytes, bytes);
}

// The 16 x 16 transpose in four steps, each exchanging blocks of twice the size.
FUSED_ATTN_INLINE void transpose(VecF (&rows)[16]) {
  __m512 a[16], b[16];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; i += 8) {
    FUSED_ATTN_UNROLL
    for (int j = 0; j < 4; ++j) {
      a[i + j] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0x88);
      a[i + j + 4] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0xdd);
    }
  }
  FUSED_ATTN_UNROLL
  for (int j = 0; j < 8; ++j) {
    rows[j].v = _mm512_shuffle_f32x4(a[j], a[j + 8], 0x88);
    rows[j + 8].v = _mm512_shuffle_f32x4(a[j], a[j + 8], 0xdd);
  }
}

// Lane i of the result is the sum of rows[i]. Each step adds up halves, quarters, ... of two
// vectors and leaves them in one; in which lane a row ends decides where it starts.
FUSED_ATTN_INLINE VecF sum_each(const VecF (&rows)[16]) {
  constexpr int kStart[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 a[8], b[4], c[2];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 8; ++i) {
    const __m512 x = rows[kStart[i]].v, y = rows[kStart[i + 8]].v;
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                         _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x44),
                         _mm512_shuffle_ps(b[i], b[i + 2], 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd))};
}

#if FUSED_ATTN_BF16_DOT

// Adds the products of bf16 pairs: acc + low(a) * low(b) + high(a) * high(b).
FUSED_ATTN_INLINE VecF dot_pairs(VecU a, VecU b, VecF acc) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}

// Lane i becomes the bf16 pair (low = a[i], high = b[i]).
FUSED_ATTN_INLINE VecU pack_pairs(VecF a, VecF b) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, halves)};
}
FUSED_ATTN_INLINE VecF even_of_pairs(VecU pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.v, 16))};
}
FUSED_ATTN_INLINE VecF odd_of_pairs(VecU pairs) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(pairs.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

#endif

}  // namespace fused_attn::FUSED_ATTN_LEVEL
