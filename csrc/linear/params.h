// What one call of a linear layer is, in raw pointers, sizes and strides (elements).
//
//   y = x W^T + bias                     dx = dy W    dW = dy^T x    dbias = the sum of dy's rows
//
// Operands are float32, bfloat16 or float16, all of one dtype; sums are taken in float32 and
// rounded once.
#pragma once

#include "common/row_view.h"

namespace fused_attn::linear {

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;  // of x and y
  int64_t in = 0;    // of a row of x and of W
  int64_t out = 0;   // of a row of y; rows of W
  int threads = 1;
};

struct Params : Problem {
  Rows x, weight, bias, y;  // bias may be absent; y is dense
};

struct BackwardParams : Problem {
  Rows x, weight, dy;
  Rows dx, dweight, dbias;  // dense; each may be absent
};

}  // namespace fused_attn::linear
