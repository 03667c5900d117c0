// Vec<float> and Vec<uint32_t> as four 128-bit registers (level neon).
#pragma once

#include <arm_neon.h>

#include "cpu/vec_generic.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// Bit i of a mask belongs to lane i % 4 of register i / 4.
FUSED_ATTN_INLINE uint32x4_t bits_of_register(int i) {
  const uint32x4_t first = {1, 2, 4, 8};
  return vshlq_u32(first, vdupq_n_s32(4 * i));
}
// All bits set in the lanes of register i whose bit in `mask` is set.
FUSED_ATTN_INLINE uint32x4_t expand_mask(Mask mask, int i) {
  return vtstq_u32(vdupq_n_u32(mask), bits_of_register(i));
}
// The other way: lanes[i] is all ones or all zeros.
FUSED_ATTN_INLINE Mask collect_mask(const uint32x4_t (&lanes)[4]) {
  uint32x4_t bits = vandq_u32(lanes[0], bits_of_register(0));
  FUSED_ATTN_UNROLL
  for (int i = 1; i < 4; ++i) bits = vorrq_u32(bits, vandq_u32(lanes[i], bits_of_register(i)));
  return static_cast<Mask>(vaddvq_u32(bits));
}

template <>
struct Vec<float> {
  float32x4_t q[4];

  static FUSED_ATTN_INLINE Vec zero() { return set1(0.0f); }
  static FUSED_ATTN_INLINE Vec set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {{v, v, v, v}};
  }
  static FUSED_ATTN_INLINE Vec load(const float* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
  }
  static FUSED_ATTN_INLINE Vec load(const float* from, int n) {
    alignas(64) float lanes[16] = {};
    std::memcpy(lanes, from, sizeof(float) * static_cast<size_t>(n));
    return load(lanes);
  }
  FUSED_ATTN_INLINE void store(float* to) const {
    FUSED_ATTN_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, q[i]);
  }
  FUSED_ATTN_INLINE void store(float* to, int n) const {
    alignas(64) float lanes[16];
    store(lanes);
    std::memcpy(to, lanes, sizeof(float) * static_cast<size_t>(n));
  }
};

template <>
struct Vec<uint32_t> {
  uint32x4_t q[4];

  static FUSED_ATTN_INLINE Vec zero() { return set1(0); }
  static FUSED_ATTN_INLINE Vec set1(uint32_t x) {
    const uint32x4_t v = vdupq_n_u32(x);
    return {{v, v, v, v}};
  }
  static FUSED_ATTN_INLINE Vec load(const uint32_t* from) {
    return {{vld1q_u32(from), vld1q_u32(from + 4), vld1q_u32(from + 8), vld1q_u32(from + 12)}};
  }
  static FUSED_ATTN_INLINE Vec load(const uint32_t* from, int n) {
    alignas(64) uint32_t lanes[16] = {};
    std::memcpy(lanes, from, sizeof(uint32_t) * static_cast<size_t>(n));
    return load(lanes);
  }
  FUSED_ATTN_INLINE void store(uint32_t* to) const {
    FUSED_ATTN_UNROLL
    for (int i = 0; i < 4; ++i) vst1q_u32(to + 4 * i, q[i]);
  }
  FUSED_ATTN_INLINE void store(uint32_t* to, int n) const {
    alignas(64) uint32_t lanes[16];
    store(lanes);
    std::memcpy(to, lanes, sizeof(uint32_t) * static_cast<size_t>(n));
  }
};

using VecF = Vec<float>;
using VecU = Vec<uint32_t>;

// The vector whose register i is `expression`.
#define FUSED_ATTN_EACH_REGISTER(V, expression)      \
  V c;                                               \
  FUSED_ATTN_UNROLL                                  \
  for (int i = 0; i < 4; ++i) c.q[i] = (expression); \
  return c

FUSED_ATTN_INLINE VecF operator+(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vaddq_f32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF operator-(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vsubq_f32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF operator*(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vmulq_f32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF operator/(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vdivq_f32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF fma(VecF a, VecF b, VecF c_) {
  FUSED_ATTN_EACH_REGISTER(VecF, vfmaq_f32(c_.q[i], a.q[i], b.q[i]));
}
// The processor's own maximum would give NaN where either is one.
FUSED_ATTN_INLINE VecF max(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF min(VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF abs(VecF a) {
  FUSED_ATTN_EACH_REGISTER(VecF, vabsq_f32(a.q[i]));
}
FUSED_ATTN_INLINE VecF sqrt(VecF a) {
  FUSED_ATTN_EACH_REGISTER(VecF, vsqrtq_f32(a.q[i]));
}
// The estimate has 8 correct bits, and a step of Newton's doubles them.
FUSED_ATTN_INLINE float32x4_t reciprocal_estimate(float32x4_t a) {
  const float32x4_t estimate = vrecpeq_f32(a);
  return vmulq_f32(estimate, vrecpsq_f32(a, estimate));
}
FUSED_ATTN_INLINE VecF reciprocal_estimate(VecF a) {
  FUSED_ATTN_EACH_REGISTER(VecF, reciprocal_estimate(a.q[i]));
}
FUSED_ATTN_INLINE float32x4_t sum_of_registers(VecF a) {
  return vaddq_f32(vaddq_f32(a.q[0], a.q[1]), vaddq_f32(a.q[2], a.q[3]));
}
FUSED_ATTN_INLINE float sum(VecF a) {
  return vaddvq_f32(sum_of_registers(a));
}
FUSED_ATTN_INLINE float largest(VecF a) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.q[0], a.q[1]), vmaxnmq_f32(a.q[2], a.q[3])));
}
FUSED_ATTN_INLINE VecF select(Mask mask, VecF a, VecF b) {
  FUSED_ATTN_EACH_REGISTER(VecF, vbslq_f32(expand_mask(mask, i), a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE Mask greater(VecF a, VecF b) {
  uint32x4_t lanes[4];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) lanes[i] = vcgtq_f32(a.q[i], b.q[i]);
  return collect_mask(lanes);
}
FUSED_ATTN_INLINE VecF round(VecF a) {
  FUSED_ATTN_EACH_REGISTER(VecF, vrndnq_f32(a.q[i]));
}
FUSED_ATTN_INLINE float32x4_t power_of_2(float32x4_t n) {
  const int32x4_t biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
}
// a * 2^n for integral n; results below the smallest normal number become 0.
FUSED_ATTN_INLINE VecF scale2(VecF a, VecF n) {
  const VecF clamped = min(max(n, VecF::set1(-127.0f)), VecF::set1(128.0f));
  FUSED_ATTN_EACH_REGISTER(VecF, vmulq_f32(a.q[i], power_of_2(clamped.q[i])));
}

FUSED_ATTN_INLINE VecU operator+(VecU a, VecU b) {
  FUSED_ATTN_EACH_REGISTER(VecU, vaddq_u32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecU operator^(VecU a, VecU b) {
  FUSED_ATTN_EACH_REGISTER(VecU, veorq_u32(a.q[i], b.q[i]));
}
FUSED_ATTN_INLINE VecF from_int_bits(VecU a) {
  FUSED_ATTN_EACH_REGISTER(VecF, vreinterpretq_f32_u32(a.q[i]));
}
FUSED_ATTN_INLINE Mask not_below(VecU a, VecU b) {
  uint32x4_t lanes[4];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) lanes[i] = vcgeq_u32(a.q[i], b.q[i]);
  return collect_mask(lanes);
}
FUSED_ATTN_INLINE void multiply_wide(VecU a, uint32_t b, VecU& low, VecU& high) {
  const uint32x4_t factor = vdupq_n_u32(b);
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint64x2_t first = vmull_u32(vget_low_u32(a.q[i]), vget_low_u32(factor));
    const uint64x2_t last = vmull_high_u32(a.q[i], factor);
    low.q[i] = vuzp1q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last));
    high.q[i] = vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last));
  }
}

// Sixteen numbers of 16 bits.
struct Halves {
  uint16x8_t q[2];
};

FUSED_ATTN_INLINE float32x4_t widen(uint16x4_t bits, BFloat16) {
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}
FUSED_ATTN_INLINE float32x4_t widen(uint16x4_t bits, Float16) {
  return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}
template <class S>
FUSED_ATTN_INLINE VecF widen(Halves bits, S) {
  return {{widen(vget_low_u16(bits.q[0]), S{}), widen(vget_high_u16(bits.q[0]), S{}),
           widen(vget_low_u16(bits.q[1]), S{}), widen(vget_high_u16(bits.q[1]), S{})}};
}

FUSED_ATTN_INLINE uint16x4_t narrow(float32x4_t a, Float16) {
  return vreinterpret_u16_f16(vcvt_f16_f32(a));
}
// The upper half of each number, rounded to nearest even.
FUSED_ATTN_INLINE uint16x4_t narrow(float32x4_t a, BFloat16) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}
template <class S>
FUSED_ATTN_INLINE Halves narrow(VecF a, S) {
  return {{vcombine_u16(narrow(a.q[0], S{}), narrow(a.q[1], S{})),
           vcombine_u16(narrow(a.q[2], S{}), narrow(a.q[3], S{}))}};
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
  const auto* p = reinterpret_cast<const uint16_t*>(from);
  return widen(Halves{{vld1q_u16(p), vld1q_u16(p + 8)}}, S{});
}
template <class S>
FUSED_ATTN_INLINE VecF load(const S* from, int n) {
  alignas(32) S lanes[16] = {};
  std::memcpy(lanes, from, sizeof(S) * static_cast<size_t>(n));
  return load(lanes);
}
// Also returns what it stored.
template <class S>
FUSED_ATTN_INLINE Halves store_halves(S* to, VecF v) {
  const Halves bits = narrow(v, S{});
  auto* p = reinterpret_cast<uint16_t*>(to);
  vst1q_u16(p, bits.q[0]);
  vst1q_u16(p + 8, bits.q[1]);
  return bits;
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v) {
  store_halves(to, v);
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, VecF v, int n) {
  alignas(32) S lanes[16];
  store(lanes, v);
  std::memcpy(to, lanes, sizeof(S) * static_cast<size_t>(n));
}

// No intrinsic leads past the caches.
template <class T>
FUSED_ATTN_INLINE void stream(T* to, VecF v) {
  store(to, v);
}
FUSED_ATTN_INLINE void stream_fence() {}

template <class S>
FUSED_ATTN_INLINE VecF store_rounded(S* to, VecF v, bool) {
  return widen(store_halves(to, v), S{});
}

// Bit i of the result: is byte i of n <= 64 non-zero?
FUSED_ATTN_INLINE uint64_t nonzero_bytes(const uint8_t* from, int n) {
  alignas(64) uint8_t bytes[64] = {};
  std::memcpy(bytes, from, static_cast<size_t>(n));
  const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t bits[4];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t sixteen = vld1q_u8(bytes + 16 * i);
    bits[i] = vandq_u8(vtstq_u8(sixteen, sixteen), bit);
  }
  // Adding neighbours three times leaves the sum of each eight, which is their byte of bits.
  const uint8x16_t twos = vpaddq_u8(bits[0], bits[1]), more = vpaddq_u8(bits[2], bits[3]);
  const uint8x16_t fours = vpaddq_u8(twos, more);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(fours, fours)), 0);
}

// Transposes the 4 x 4 block of four registers.
FUSED_ATTN_INLINE void transpose4(float32x4_t (&r)[4]) {
  float64x2_t pairs[4];  // (0, 1) of even columns, of odd ones, then (2, 3) of them
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = vreinterpretq_f64_f32(vtrn1q_f32(r[i], r[i + 1]));
    pairs[i + 1] = vreinterpretq_f64_f32(vtrn2q_f32(r[i], r[i + 1]));
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 2; ++i) {
    r[i] = vreinterpretq_f32_f64(vtrn1q_f64(pairs[i], pairs[i + 2]));
    r[i + 2] = vreinterpretq_f32_f64(vtrn2q_f64(pairs[i], pairs[i + 2]));
  }
}

FUSED_ATTN_INLINE void transpose(VecF (&rows)[16]) {
  float32x4_t block[4][4][4];  // by row and by column of blocks
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; ++i) {
    FUSED_ATTN_UNROLL
    for (int j = 0; j < 4; ++j) block[i / 4][j][i % 4] = rows[i].q[j];
  }
  for (auto& row : block) {
    for (auto& b : row) transpose4(b);
  }
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; ++i) {
    FUSED_ATTN_UNROLL
    for (int j = 0; j < 4; ++j) rows[i].q[j] = block[j][i / 4][i % 4];
  }
}

// Lane i of the result is the sum of rows[i].
FUSED_ATTN_INLINE VecF sum_each(const VecF (&rows)[16]) {
  float32x4_t sums[16];
  FUSED_ATTN_UNROLL
  for (int i = 0; i < 16; ++i) sums[i] = sum_of_registers(rows[i]);
  FUSED_ATTN_EACH_REGISTER(VecF, vpaddq_f32(vpaddq_f32(sums[4 * i], sums[4 * i + 1]),
                                            vpaddq_f32(sums[4 * i + 2], sums[4 * i + 3])));
}

#undef FUSED_ATTN_EACH_REGISTER

}  // namespace fused_attn::FUSED_ATTN_LEVEL
