// What one call of a linear layer is, in raw pointers, sizes and strides (elements).
//
//   y = residual + dropout(act(x W^T + bias))
//   y = residual + dropout(act(gate) * up)    gated: x W^T + bias is (gate, up)
//
//   dx = dh W    dW = dh^T x    dbias = the sum of dh's rows    dh = dropout(dy), no activation
//
// Operands are float32, bfloat16 or float16, all of one dtype; sums are taken in float32 and
// rounded once.
#pragma once

#include "common/activation.h"
#include "common/row_view.h"

namespace fused_attn::linear {

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;  // of x and y
  int64_t in = 0;    // of a row of x and of W
  int64_t out = 0;   // of a row of y; rows of W, of which a gated call has twice as many
  const int64_t* rng = nullptr;  // {seed, offset} of the dropout; absent = no dropout
  double dropout_p = 0.0;
  int threads = 1;
};

// What is made of a product before it is rounded.
struct Epilogue {
  bool activates = false;
  Activation activation = Activation::kRelu;
  bool gated = false;
};

struct Params : Problem, Epilogue {
  Rows x, weight, bias, residual, y;  // bias and residual may be absent; y is dense
};

struct BackwardParams : Problem {
  Rows x, weight, dy;
  Rows dx, dweight, dbias;  // dense; each may be absent
};

}  // namespace fused_attn::linear
