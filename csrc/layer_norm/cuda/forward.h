// h = dropout(x) + residual, y = (h - mean) * rstd * weight + bias, for NVIDIA GPUs from sm_80 on.
// Rows that fit are held in registers: read once, centred before they are squared.
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
    const float mean = begin();
    float squares = 0.0f;
    each([&](int, const float (&h)[kWidth]) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) squares += (h[i] - mean) * (h[i] - mean);
    });
    const float variance =
        sum_over_row<Shape::kThreads>(squares, scratch_) / static_cast<float>(p_.width);
    const float rstd = device::reciprocal_root(variance + p_.eps);
    void* y = row_of<T>(p_.y, row_, p_.width);
    each([&](int column, const float (&h)[kWidth]) {
      float result[kWidth];
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) result[i] = (h[i] - mean) * rstd;
      scale(column, result);
      store<T>(y, column, result);
    });
    if (device::thread_index() % Shape::kThreads != 0) return;
    if (p_.mean != nullptr) p_.mean[row_] = mean;
    if (p_.rstd != nullptr) p_.rstd[row_] = rstd;
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
