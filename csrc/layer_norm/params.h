// What one norm call is, in raw pointers, sizes and strides (elements).
//
//   h = dropout(x) + residual          rounded to `dtype`; no dropout without residual
//   y = (h - mean) * rstd * weight + bias         mean = 0 for RMSNorm
//
// A row is what one pair of statistics covers: `width` elements of the last dimensions. Statistics
// and arithmetic are float32 (float64 for float64).
#pragma once

#include "common/row_view.h"

namespace fused_attn::layer_norm {

struct Problem {
  DType dtype = DType::kFloat32;  // of y and h: that of x, promoted with the residual's
  int64_t rows = 0;
  int64_t width = 0;

  Rows x, residual;              // dtypes of their own, no wider than `dtype`
  Rows weight, bias;             // one row each, of any floating dtype
  const int64_t* rng = nullptr;  // {seed, offset} of the dropout; absent = no dropout

  bool rms = false;
  double dropout_p = 0.0;
  int threads = 1;
};

struct Params : Problem {
  double eps = 0.0;
  Rows y, h;             // h may be absent, or the very memory of x or residual
  void* mean = nullptr;  // (rows,), the type of the statistics; may be absent
  void* rstd = nullptr;
};

// `h` is the sum if the forward kept it; otherwise it is computed again from x and residual.
struct BackwardParams : Problem {
  Rows h;
  const void* mean = nullptr;  // absent for RMSNorm
  const void* rstd = nullptr;
  Rows dy, dh;                         // dh, the gradient of the sum, may be absent
  Rows dx, dresidual, dweight, dbias;  // in the dtypes of their operands; any may be absent
};

}  // namespace fused_attn::layer_norm
