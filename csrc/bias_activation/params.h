// What one call of bias + activation is, in raw pointers, sizes and strides (elements).
//
//   y = dropout(act(x + bias))
//   y = dropout(act(gate + bias_gate) * (up + bias_up))    gated: a row of x and of bias is (gate,
//   up)
//
// Arithmetic is float32 (float64 for float64).
#pragma once

#include "common/activation.h"
#include "common/row_view.h"

namespace fused_attn::bias_activation {

struct Problem {
  DType dtype = DType::kFloat32;  // of y: that of x, promoted with the bias's
  int64_t rows = 0;
  int64_t width = 0;  // of y; a row of x and of bias is twice as wide if gated

  Rows x, bias;                  // dtypes of their own, no wider than `dtype`
  const int64_t* rng = nullptr;  // {seed, offset} of the dropout; absent = no dropout

  Activation activation = Activation::kRelu;
  bool gated = false;
  double dropout_p = 0.0;
  int threads = 1;

  int64_t width_in() const { return gated ? 2 * width : width; }
};

struct Params : Problem {
  Rows y;  // may be the very memory of x (of its gates if gated)
};

struct BackwardParams : Problem {
  Rows dy;
  Rows dx, dbias;  // in the dtypes of their operands; either may be absent
};

}  // namespace fused_attn::bias_activation
