// h = dropout(x) + residual, y = (h - mean) * rstd * weight + bias, for NVIDIA GPUs from sm_80 on.
// Rows that fit are held in registers: read once, centred before they are squared.
//
// Barriers: the block's, which all of its threads arrive at and wait for, twice in each over_row()
// of a row that more than a warp holds.
#pragma once

#include "layer_norm/cuda/rows.h"

namespace fused_attn::layer_norm {

template <class Shape>
class ForwardRow {
 public:
  using T = typename Shape::T;
  static constexpr int kWidth = Shape::kWidth;

  FUSED_ATTN_DEVICE ForwardRow(const DeviceNorm& p, int64_t row, SharedAddress scratch)
      : p_(p),
        row_(row),
        scratch_(scratch),
        x_(row_of<T>(p.x, row, p.width)),
        residual_(p.residual == nullptr ? nullptr : row_of<T>(p.residual, row, p.width)) {}

  FUSED_ATTN_DEVICE void run() {
    float mean = begin();
    float variance = spread(mean);
    RowPower power(1.0f);
    float eps = p_.eps, stored_power = 1.0f;
    if (out_of_range(variance)) {
      power = RowPower(device::largest(largest(), device::square_root(eps)));
      multiply(power.factor);
      mean = average(0.0f);
      mean += average(mean);  // exactly the number that all of a row's are
      variance = spread(mean);
      // The size of huge equal numbers says nothing about their deviation: eps alone counts.
      if (variance != 0.0f || power.factor > 1.0f) {
        eps = eps * power.factor * power.factor;
        stored_power = power.factor;
      }
    }
    const float rstd = device::reciprocal_root(variance + eps);
    void* y = row_of<T>(p_.y, row_, p_.width);
    each([&](int column, const float (&h)[kWidth]) {
      float result[kWidth];
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) result[i] = (h[i] - mean) * rstd;
      scale(column, result);
      store<T>(y, column, result);
    });
    if (device::thread_index() % Shape::kThreads != 0) return;
    if (p_.mean != nullptr) device::global_store(p_.mean + row_, mean * power.inverse);
    if (p_.rstd != nullptr) {
      device::global_store(p_.rstd + row_, product_of_any_size(rstd, stored_power));
    }
  }

 private:
  // The first look at the row: stores the sum, and returns the mean (0 for RMSNorm).
  FUSED_ATTN_DEVICE float begin() {
    float sum = 0.0f;
    each_chunk<Shape>(p_.width, [&](int chunk, int column) {
      float (&h)[kWidth] = held_[chunk];
      load_sum(column, h);
      if (p_.h != nullptr) store<T>(row_of<T>(p_.h, row_, p_.width), column, h);
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) sum += h[i];
    });
    if (p_.rms) return 0.0f;
    return sum_over_row<Shape::kThreads>(sum, scratch_) / static_cast<float>(p_.width);
  }

  // Of what rows that have been multiplied since are above `from`.
  FUSED_ATTN_DEVICE float average(float from) {
    if (p_.rms) return 0.0f;
    float sum = 0.0f;
    each([&](int, const float (&h)[kWidth]) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) sum += h[i] - from;
    });
    return sum_over_row<Shape::kThreads>(sum, scratch_) / static_cast<float>(p_.width);
  }

  // The variance.
  FUSED_ATTN_DEVICE float spread(float mean) {
    float squares = 0.0f;
    each([&](int, const float (&h)[kWidth]) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) squares += (h[i] - mean) * (h[i] - mean);
    });
    return sum_over_row<Shape::kThreads>(squares, scratch_) / static_cast<float>(p_.width);
  }

  // Have squares overflowed, or underflowed where eps does not make up for it?
  FUSED_ATTN_DEVICE bool out_of_range(float variance) const {
    constexpr float kHighest = 3.4028235e38f, kSmall = 0x1p-80f;
    return !(variance <= kHighest) || (variance < kSmall && p_.eps < kSmall * 0x1p20f);
  }

  FUSED_ATTN_DEVICE float largest() {
    float most = 0.0f;
    each([&](int, const float (&h)[kWidth]) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) most = device::largest(most, device::magnitude(h[i]));
    });
    return largest_of_row<Shape::kThreads>(most, scratch_);
  }

  // Makes each() give the row times this power of two.
  FUSED_ATTN_DEVICE void multiply(float factor) {
    factor_ = factor;
    if constexpr (Shape::kHeld) {
      each_chunk<Shape>(p_.width, [&](int chunk, int) {
        FUSED_ATTN_UNROLL_LOOP
        for (int i = 0; i < kWidth; ++i) held_[chunk][i] *= factor;
      });
    }
  }

  // Calls function(column, h) for all of this thread's columns.
  template <class Function>
  FUSED_ATTN_DEVICE void each(const Function& function) {
    each_chunk<Shape>(p_.width, [&](int chunk, int column) {
      if constexpr (!Shape::kHeld) again(column, held_[chunk]);
      function(column, held_[chunk]);
    });
  }

  // The sum is rounded to the type that it is stored in, whether it is or not.
  FUSED_ATTN_DEVICE void load_sum(int column, float (&h)[kWidth]) const {
    load<T>(x_, column, h);
    if (residual_ == nullptr) return;
    if (p_.rng != nullptr) drop(p_, row_, column, h);
    float residual[kWidth];
    load<T>(residual_, column, residual);
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) h[i] = T::widen(T::narrow(h[i] + residual[i]));
  }
  // The sum may have replaced what it was made of.
  FUSED_ATTN_DEVICE void again(int column, float (&h)[kWidth]) const {
    if (p_.h != nullptr) {
      load<T>(row_of<T>(static_cast<const void*>(p_.h), row_, p_.width), column, h);
    } else {
      load_sum(column, h);
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) h[i] *= factor_;
  }

  FUSED_ATTN_DEVICE void scale(int column, float (&y)[kWidth]) const {
    float parameter[kWidth];
    if (p_.weight != nullptr) {
      load_parameter<T>(p_, p_.weight, column, parameter);
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) y[i] *= parameter[i];
    }
    if (p_.bias != nullptr) {
      load_parameter<T>(p_, p_.bias, column, parameter);
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) y[i] += parameter[i];
    }
  }

  const DeviceNorm& p_;
  int64_t row_;
  SharedAddress scratch_;
  const void *x_, *residual_;
  float factor_ = 1.0f;  // see multiply()
  float held_[Shape::kHeld ? Shape::kChunks : 1][kWidth];
};

template <class Shape>
FUSED_ATTN_KERNEL(kBlockThreads<Shape::kThreads>)
norm_forward_kernel(FUSED_ATTN_GRID_CONSTANT DeviceNorm p) {
  const int64_t row = int64_t{device::block_index()} * kRowsPerBlock<Shape::kThreads> +
                      device::thread_index() / Shape::kThreads;
  if (row >= p.rows) return;
  ForwardRow<Shape>(p, row, device::shared_base()).run();
}

}  // namespace fused_attn::layer_norm
