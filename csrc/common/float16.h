// The 16-bit floating point types in memory, and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace fused_attn {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FUSED_ATTN_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FUSED_ATTN_INLINE float to_float(float x) {
  return x;
}
FUSED_ATTN_INLINE float to_float(BFloat16 x) {
  return bits_as<float>(uint32_t{x.bits} << 16);
}

FUSED_ATTN_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifted into place, the exponent is 112 too small; a multiplication mends it and normalises
  // subnormal numbers on the way. Infinity and NaN (exponent 31) get float's largest exponent.
  const float value = bits_as<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits =
      magnitude >= 0x7c00u ? (magnitude << 13 | 0x7f800000u) : bits_as<uint32_t>(value);
  return bits_as<float>(bits | sign);
}

// Round to nearest, ties to even; NaN stays a NaN.
FUSED_ATTN_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16 | 0x40u) : rounded >> 16)};
}

FUSED_ATTN_INLINE Float16 to_float16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t sign = bits >> 31 << 15;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves its mantissa, rounded by the FPU.
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

FUSED_ATTN_INLINE void from_float(float x, float* to) {
  *to = x;
}
FUSED_ATTN_INLINE void from_float(float x, BFloat16* to) {
  *to = to_bfloat16(x);
}
FUSED_ATTN_INLINE void from_float(float x, Float16* to) {
  *to = to_float16(x);
}

}  // namespace fused_attn
