#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::linear {

// linear_forward(x, weight, bias, y, threads) and
// linear_backward(x, weight, dy, dx, dweight, dbias, threads): tensors or None; the results are
// dense, operands have any strides. See params.h.
void bind(pybind11::module_& m);

}  // namespace fused_attn::linear
