// What one call of the embedding is, in raw pointers, sizes and strides (elements).
//
//   y[i] = dropout(scale * weight[tokens[i]] + table[position of i])
//
// Arithmetic is float32 (float64 for float64).
#pragma once

#include "common/row_view.h"

namespace fused_attn::embedding {

struct Problem {
  DType dtype = DType::kFloat32;  // of y: that of the weight, promoted with the table's
  int64_t rows = 0;               // tokens in all
  int64_t length = 0;             // tokens of a sequence
  int64_t width = 0;
  int64_t num_tokens = 0, num_positions = 0;  // rows of weight and table

  const int64_t* tokens = nullptr;     // dense, in range
  const int64_t* positions = nullptr;  // likewise; absent: offset + i % length
  Rows weight, table;                  // dtypes of their own; the table may be absent
  const int64_t* rng = nullptr;        // {seed, offset} of the dropout; absent = no dropout

  double scale = 1.0;
  int64_t offset = 0;
  int64_t padding_idx = -1;  // row of the weight that gets no gradient; -1 for none
  double dropout_p = 0.0;
  int threads = 1;
};

struct Params : Problem {
  Rows y;
};

struct BackwardParams : Problem {
  Rows dy;
  Rows dweight, dtable;  // in the dtypes of their operands; either may be absent
};

}  // namespace fused_attn::embedding
