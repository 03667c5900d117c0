// Tensors as rows, for the bindings of operations that treat each row by itself.
#pragma once

#include "common/row_view.h"
#include "common/tensor.h"

namespace fused_attn {

// The last `dims` dimensions are the row. Shapes and dtypes have been checked in Python.
Rows rows(const TensorView& tensor, int dims);

// Elements in dimensions [begin, end).
int64_t size(const TensorView& tensor, int begin, int end);

// `tensor`, if present, has the shape of `like` from dimension `first` on.
void check_same_shape(const TensorView& tensor, const TensorView& like, int first = 0);

// The {seed, offset} of a dropout, or null.
const int64_t* dropout_rng(const TensorView& rng);

}  // namespace fused_attn
