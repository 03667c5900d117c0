// The product of a few rows of x with W. To pack W would take longer than the product: a number of
// W is used once for each row. So rows of W are read as they lie, lanes run along their numbers,
// and a tile of sums of some rows of x with some of W stays in registers.
#pragma once

#include "linear/cpu/epilogue.h"

namespace fused_attn::linear::FUSED_ATTN_LEVEL {

template <class T>
class FewRows {
 public:
  // Whether this is the faster way.
  static bool serves(const Params& p) { return p.rows <= kMost && p.weight.inner.dense(); }

  explicit FewRows(const Params& p)
      : p_(p),
        finish_(finish_strip<T>(p)),
        stride_(ceil_div(p.in, kLanes) * kLanes),
        weight_(static_cast<const T*>(p.weight.data)) {}

  void run() {
    static thread_local Buffer buffer;
    x_ = buffer.get<float>(p_.rows * stride_);
    const Operand<T> x = by_rows<T>(p_.x);
    for (int64_t r = 0; r < p_.rows; ++r) {
      float* to = x_ + r * stride_;
      for (int64_t k = 0; k < p_.in; ++k) to[k] = convert<float>(*x.at(r, k));
      for (int64_t k = p_.in; k < stride_; ++k) to[k] = 0.0f;
    }
    parallel_for(p_.threads, ceil_div(p_.out, kColumns),
                 [&](int64_t task) { columns(task * kColumns); });
  }

 private:
  static constexpr int64_t kMost = 16;
  static constexpr int kColumns = 64;  // of a task: a whole number of draws of the dropout
  static constexpr int kVectors = kRegisterVectors<float>;
  // Accumulators, and one vector of each row of W.
  static constexpr int kRows = kVectors >= 32 ? 4 : kVectors >= 8 ? 3 : 1;
  static constexpr int kWeights = kVectors >= 32 ? 4 : 2;
  static_assert(kLanes % kWeights == 0);

  // 64 columns of y from `first` on.
  void columns(int64_t first) const {
    alignas(64) float sums[2][kMost * kLanes];
    Mask keep[kMost * kColumns / kLanes];
    const int64_t width = smaller<int64_t>(kColumns, p_.out - first);
    if (p_.rng != nullptr) {
      const Dropout dropout(p_.rng, p_.dropout_p);
      for (int64_t r = 0; r < p_.rows; ++r) {
        dropout.draw(r, first, width, keep + r * Dropout::masks(width));
      }
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const int lanes = static_cast<int>(smaller<int64_t>(kLanes, width - c));
      strip(first + c, lanes, sums[0]);
      if (p_.gated) strip(p_.out + first + c, lanes, sums[1]);
      finish_(p_, {sums[0], p_.gated ? sums[1] : nullptr, kLanes, 0, static_cast<int>(p_.rows),
                   first + c, lanes, p_.rng == nullptr ? nullptr : keep + c / kLanes,
                   Dropout::masks(width)});
    }
  }

  // sums[row][lane] = the product of a row of x and row `first + lane` of W.
  void strip(int64_t first, int lanes, float* sums) const {
    for (int lane = 0; lane < kLanes; lane += kWeights) {
      const T* w[kWeights];
      for (int i = 0; i < kWeights; ++i) {
        w[i] = weight_ + p_.weight.outer.offset(first + smaller(lane + i, lanes - 1));
      }
      tiles<kRows>(w, 0, sums + lane);
    }
  }

  // Tiles of R rows of x from `row` on while they fit, then of fewer.
  template <int R>
  void tiles(const T* const (&w)[kWeights], int64_t row, float* sums) const {
    for (; row + R <= p_.rows; row += R) tile<R>(w, row, sums);
    if constexpr (R > 1) tiles<R - 1>(w, row, sums);
  }

  template <int R>
  FUSED_ATTN_INLINE void tile(const T* const (&w)[kWeights], int64_t row, float* sums) const {
    VecF acc[R][kWeights];
    for (auto& vectors : acc) {
      for (VecF& vector : vectors) vector = VecF::zero();
    }
    const float* x = x_ + row * stride_;
    const auto step = [&](int64_t k, auto lanes) FUSED_ATTN_BODY {
      VecF weight[kWeights];
      FUSED_ATTN_UNROLL
      for (int i = 0; i < kWeights; ++i) weight[i] = load(w[i] + k, lanes);
      FUSED_ATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const VecF number = VecF::load(x + r * stride_ + k);
        FUSED_ATTN_UNROLL
        for (int i = 0; i < kWeights; ++i) acc[r][i] = fma(number, weight[i], acc[r][i]);
      }
    };
    for_columns(p_.in, step);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kWeights; ++i) sums[(row + r) * kLanes + i] = sum(acc[r][i]);
    }
  }

  const Params& p_;
  const FinishStrip<T> finish_;
  const int64_t stride_;
  const T* weight_;
  float* x_ = nullptr;  // [row][number], 0 from the last on
};

}  // namespace fused_attn::linear::FUSED_ATTN_LEVEL
