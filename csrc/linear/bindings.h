#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::linear {

// linear_forward(x, weight, bias, residual, dropout_rng, y, activation, gated, dropout_p, threads)
// and linear_backward(x, weight, dropout_rng, dy, dx, dweight, dbias, dropout_p, threads): tensors
// or None, activation "" for none; the results are dense, operands have any strides. See params.h.
void bind(pybind11::module_& m);

}  // namespace fused_attn::linear
