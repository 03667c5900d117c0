// What the norm kernels share: elements, groups of threads that hold a row, and the problem.
//
// A row is held by kThreads threads, each with kChunks pieces of kWidth neighbouring columns in
// registers; with kChunks = 0 rows are too long for that and are read again for every pass.
#pragma once

#include "cuda/device.h"
#include "cuda/philox.h"

namespace fused_attn::layer_norm {

using device::SharedAddress;

// Elements in memory: their bits, and float32 for everything else.
struct Float32 {
  using Bits = float;
  static FUSED_ATTN_DEVICE float widen(float x) { return x; }
  static FUSED_ATTN_DEVICE float narrow(float x) { return x; }
};
template <class Element>
struct Half {
  using Bits = uint16_t;
  static FUSED_ATTN_DEVICE float widen(uint16_t bits) { return Element::widen(bits); }
  static FUSED_ATTN_DEVICE uint16_t narrow(float x) {
    return static_cast<uint16_t>(Element::pack(x, 0.0f));
  }
};
using BFloat16 = Half<device::BFloat16>;
using Float16 = Half<device::Float16>;

// `kWidth` neighbours, moved by one instruction.
template <class Bits, int kWidth>
struct alignas(sizeof(Bits) * kWidth) Pack {
  Bits value[kWidth];
};

template <class T, int kWidth>
FUSED_ATTN_DEVICE void load(const void* row, int64_t column, float (&to)[kWidth]) {
  using P = Pack<typename T::Bits, kWidth>;
  const P pack = *reinterpret_cast<const P*>(static_cast<const typename T::Bits*>(row) + column);
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kWidth; ++i) to[i] = T::widen(pack.value[i]);
}
template <class T, int kWidth>
FUSED_ATTN_DEVICE void store(void* row, int64_t column, const float (&from)[kWidth]) {
  using P = Pack<typename T::Bits, kWidth>;
  P pack;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kWidth; ++i) pack.value[i] = T::narrow(from[i]);
  device::global_store(reinterpret_cast<P*>(static_cast<typename T::Bits*>(row) + column), pack);
}

// Dense rows; null = absent.
struct DeviceNorm {
  int64_t rows;
  int width;
  const void *x, *residual;
  const void *weight, *bias;
  bool wide_parameters;  // float32 rather than the type of x
  const int64_t* rng;    // {seed, offset} of the dropout of x; null = none
  uint32_t keep_from;    // a random word is kept iff it is at least this
  float keep_scale;
  bool rms;
  float eps;
  void *y, *h;
  float *mean, *rstd;
};

// Where row `row` of a dense tensor begins.
template <class T>
FUSED_ATTN_DEVICE const void* row_of(const void* data, int64_t row, int width) {
  return static_cast<const typename T::Bits*>(data) + row * width;
}
template <class T>
FUSED_ATTN_DEVICE void* row_of(void* data, int64_t row, int width) {
  return static_cast<typename T::Bits*>(data) + row * width;
}

template <class T, int kWidth>
FUSED_ATTN_DEVICE void load_parameter(const DeviceNorm& p, const void* parameter, int column,
                                      float (&to)[kWidth]) {
  if (p.wide_parameters) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<const float*>(parameter)[column + i];
  } else {
    load<T>(parameter, column, to);
  }
}

FUSED_ATTN_DEVICE uint32_t pick(const uint32_t (&word)[4], int which) {
  const uint32_t low = (which & 1) != 0 ? word[1] : word[0];
  const uint32_t high = (which & 1) != 0 ? word[3] : word[2];
  return (which & 2) != 0 ? high : low;
}

// Drops and scales columns of a row: column j draws word j & 3 of the Philox block (j >> 2, row,
// offset).
template <int kWidth>
FUSED_ATTN_DEVICE void drop(const DeviceNorm& p, int64_t row, int column, float (&x)[kWidth]) {
  const device::Philox philox(p.rng[0], p.rng[1]);
  const auto bits = static_cast<uint64_t>(row);
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kWidth; i += 4) {
    uint32_t word[4];
    philox.draw(static_cast<uint32_t>(column + i) >> 2, static_cast<uint32_t>(bits),
                static_cast<uint32_t>(bits >> 32), word);
    FUSED_ATTN_UNROLL_LOOP
    for (int j = i; j < i + 4 && j < kWidth; ++j) {
      const uint32_t drawn = kWidth >= 4 ? word[j & 3] : pick(word, column & 3);
      x[j] = drawn < p.keep_from ? 0.0f : x[j] * p.keep_scale;
    }
  }
}

// A number of all threads that hold a row put together, in one order for all of them. `scratch`: a
// word of shared memory per warp; all threads of the block take part where a row needs more than a
// warp.
template <int kThreads, class Combine>
FUSED_ATTN_DEVICE float over_row(float x, SharedAddress scratch, const Combine& combine) {
  FUSED_ATTN_UNROLL_LOOP
  for (int mask = 1; mask < device::kWarpThreads; mask *= 2) {
    x = combine(x, device::shuffle_xor(x, mask));
  }
  if constexpr (kThreads > device::kWarpThreads) {
    const int warp = device::thread_index() / device::kWarpThreads;
    if (device::thread_index() % device::kWarpThreads == 0) {
      device::shared_store(scratch + 4 * warp, x);
    }
    device::sync_block();
    x = 0.0f;
    FUSED_ATTN_UNROLL_LOOP
    for (int w = 0; w < kThreads / device::kWarpThreads; ++w) {
      x = combine(x, device::shared_load_float(scratch + 4 * w));
    }
    device::sync_block();
  }
  return x;
}
template <int kThreads>
FUSED_ATTN_DEVICE float sum_over_row(float x, SharedAddress scratch) {
  return over_row<kThreads>(x, scratch, [](float a, float b) { return a + b; });
}
// Of numbers that are not negative.
template <int kThreads>
FUSED_ATTN_DEVICE float largest_of_row(float x, SharedAddress scratch) {
  return over_row<kThreads>(x, scratch, [](float a, float b) { return device::largest(a, b); });
}

// Rows whose squares leave the range of numbers are computed times a power of two: one that brings
// the largest of these to about 1, and its reciprocal.
struct RowPower {
  float factor, inverse;

  FUSED_ATTN_DEVICE explicit RowPower(float largest) {
    const int exponent = static_cast<int>(device::bits_of(largest) >> 23 & 0xff);
    const int biased = device::smaller(device::larger(254 - exponent, 1), 253);
    factor = device::float_of(static_cast<uint32_t>(biased) << 23);
    inverse = device::float_of(static_cast<uint32_t>(254 - biased) << 23);
  }
};

// Subnormal numbers count as 0 in arithmetic, but rstd may be one: these two make and read it.
FUSED_ATTN_DEVICE float product_of_any_size(float x, float power) {
  const float product = x * power;
  if (!(device::magnitude(product) < 0x1p-126f) || x == 0.0f) return product;
  return device::float_of(static_cast<uint32_t>(x * 0x1p23f * (power * 0x1p126f)));
}
FUSED_ATTN_DEVICE float times_2_to_96(float x) {
  const uint32_t bits = device::bits_of(x);
  return bits < 0x00800000u ? static_cast<float>(bits) * 0x1p-53f : x * 0x1p96f;
}

// Threads of a block: several rows where a warp holds one.
template <int kThreads>
constexpr int kBlockThreads = kThreads > 256 ? kThreads : 256;
template <int kThreads>
constexpr int kRowsPerBlock =
    kThreads == device::kWarpThreads ? kBlockThreads<kThreads> / device::kWarpThreads : 1;

template <class T_, int kWidth_, int kThreads_, int kChunks_>
struct RowShape {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kStep = kThreads * kWidth;  // columns between two chunks of a thread
  static constexpr bool kHeld = kChunks > 0;
  static_assert(kThreads == device::kWarpThreads || kThreads >= 256, "a warp or a block a row");
};

// Calls function(chunk, column) for every chunk of the calling thread's that the row has.
template <class Shape, class Function>
FUSED_ATTN_DEVICE void each_chunk(int width, const Function& function) {
  const int first = device::thread_index() % Shape::kThreads * Shape::kWidth;
  if constexpr (Shape::kHeld) {
    FUSED_ATTN_UNROLL_LOOP
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int column = first + c * Shape::kStep;
      if (column < width) function(c, column);
    }
  } else {
    FUSED_ATTN_KEEP_LOOP
    for (int column = first; column < width; column += Shape::kStep) function(0, column);
  }
}

}  // namespace fused_attn::layer_norm
