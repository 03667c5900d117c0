// Vec<float> and Vec<uint32_t> as cpu/vec_generic.h has them, and 16-bit types one by one (level
// portable).
#pragma once

#include "cpu/vec_generic.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

using VecF = Vec<float>;
using VecU = Vec<uint32_t>;

template <class S>
FUSED_ATTN_INLINE Vec<float> load(const S* from, int n) {
  alignas(64) float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(from[i]);
  return Vec<float>::load(lanes);
}
template <class S>
FUSED_ATTN_INLINE Vec<float> load(const S* from) {
  return load(from, 16);
}
FUSED_ATTN_INLINE Vec<float> load(const float* from) {
  return Vec<float>::load(from);
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, const Vec<float>& v, int n) {
  alignas(64) float lanes[16];
  v.store(lanes);
  for (int i = 0; i < n; ++i) from_float(lanes[i], to + i);
}
template <class S>
FUSED_ATTN_INLINE void store(S* to, const Vec<float>& v) {
  store(to, v, 16);
}
FUSED_ATTN_INLINE void store(float* to, const Vec<float>& v) {
  v.store(to);
}

FUSED_ATTN_INLINE Vec<float> from_int_bits(const Vec<uint32_t>& a) {
  Vec<float> c;
  std::memcpy(&c, &a, sizeof(c));
  return c;
}

// Bit i of the result: is byte i of n <= 64 non-zero?
FUSED_ATTN_INLINE uint64_t nonzero_bytes(const uint8_t* from, int n) {
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint64_t{from[i] != 0} << i;
  return bits;
}

// The low and high half of the 64-bit products of a and the constant b.
FUSED_ATTN_INLINE void multiply_wide(const Vec<uint32_t>& a, uint32_t b, Vec<uint32_t>& low,
                                     Vec<uint32_t>& high) {
  alignas(64) uint32_t x[16], y[16];
  a.store(x);
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t{x[i]} * b;
    x[i] = static_cast<uint32_t>(product);
    y[i] = static_cast<uint32_t>(product >> 32);
  }
  low = Vec<uint32_t>::load(x);
  high = Vec<uint32_t>::load(y);
}

// There is no way past the caches.
template <class T>
FUSED_ATTN_INLINE void stream(T* to, const VecF& v) {
  store(to, v);
}
FUSED_ATTN_INLINE void stream_fence() {}

template <class T>
FUSED_ATTN_INLINE VecF store_rounded(T* to, const VecF& v, bool) {
  store(to, v);
  return load(to);
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
