// What becomes of a strip of a product's columns while it is in the first cache: bias, activation,
// gate, dropout and residual in float32, and one rounding.
#pragma once

#include "cpu/activation.h"
#include "cpu/row_dropout.h"
#include "linear/cpu/operand.h"
#include "linear/params.h"

namespace fused_attn::linear::FUSED_ATTN_LEVEL {

// Up to 16 columns of up to `rows` rows, [row][lane], `stride` numbers apart.
struct Strip {
  const float* sums;  // the product; the gates if gated
  const float* up;    // what the gates are multiplied by
  int64_t stride;
  int64_t row;  // of y
  int rows;
  int64_t column;  // of y
  int lanes;
  const Mask* keep;  // of the dropout: one for each row, `keep_stride` apart; or null
  int64_t keep_stride;
};

// 16 numbers of a row of parameters.
template <class T>
FUSED_ATTN_INLINE VecF parameters(const Rows& rows, int64_t column, int lanes) {
  alignas(64) float numbers[kLanes] = {};
  const T* data = static_cast<const T*>(rows.data);
  for (int i = 0; i < lanes && data != nullptr; ++i) {
    numbers[i] = convert<float>(data[rows.inner.offset(column + i)]);
  }
  return VecF::load(numbers);
}

template <class T>
FUSED_ATTN_INLINE VecF residual_of(const Rows& rows, int64_t row, int64_t column, int lanes) {
  const T* data = static_cast<const T*>(rows.data) + rows.outer.offset(row);
  if (rows.inner.dense()) {
    return lanes == kLanes ? load(data + column) : load(data + column, lanes);
  }
  alignas(64) float numbers[kLanes] = {};
  for (int i = 0; i < lanes; ++i) {
    numbers[i] = convert<float>(data[rows.inner.offset(column + i)]);
  }
  return VecF::load(numbers);
}

template <class T, class Activate>
void finish_strip_as(const Params& p, const Strip& s, const Activate& act) {
  const VecF bias = parameters<T>(p.bias, s.column, s.lanes);
  const VecF bias_up = p.gated ? parameters<T>(p.bias, p.out + s.column, s.lanes) : VecF::zero();
  const VecF factor = VecF::set1(
      s.keep == nullptr ? 1.0f : static_cast<float>(Dropout(p.rng, p.dropout_p).scale()));
  T* to = static_cast<T*>(p.y.data) + s.row * p.out + s.column;
  for (int r = 0; r < s.rows; ++r) {
    VecF v = act(VecF::load(s.sums + r * s.stride) + bias);
    if (s.up != nullptr) v = v * (VecF::load(s.up + r * s.stride) + bias_up);
    if (s.keep != nullptr) v = select(s.keep[r * s.keep_stride], v * factor, VecF::zero());
    if (p.residual.data != nullptr) {
      v = v + residual_of<T>(p.residual, s.row + r, s.column, s.lanes);
    }
    s.lanes == kLanes ? store(to + r * p.out, v) : store(to + r * p.out, v, s.lanes);
  }
}

template <class T>
using FinishStrip = void (*)(const Params& p, const Strip& s);

// The one of p's activation.
template <class T>
FinishStrip<T> finish_strip(const Params& p) {
  if (!p.activates) {
    return
        [](const Params& p, const Strip& s) { finish_strip_as<T>(p, s, [](VecF x) { return x; }); };
  }
  FinishStrip<T> found = nullptr;
  with_activation(p.activation, [&](auto constant) {
    found = [](const Params& p, const Strip& s) {
      constexpr Activation kActivation = decltype(constant)::value;
      finish_strip_as<T>(p, s, [](VecF x) { return activate<kActivation, kPrecisionOf<T>>(x); });
    };
  });
  return found;
}

}  // namespace fused_attn::linear::FUSED_ATTN_LEVEL
