#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::bias_activation {

// bias_activation_forward(x, bias, rng, y, activation, gated, dropout_p, threads) and
// bias_activation_backward(x, bias, rng, dy, dx, dbias, activation, gated, dropout_p, threads):
// tensors or None, any strides. `activation` by its name in Python. See params.h.
void bind(pybind11::module_& m);

}  // namespace fused_attn::bias_activation
