#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::layer_norm {

// layer_norm_forward(x, residual, weight, bias, rng, y, h, mean, rstd, dims, eps, rms, dropout_p,
// threads) and layer_norm_backward(x, residual, weight, bias, rng, summed, mean, rstd, dy, dh, dx,
// dresidual, dweight, dbias, dims, eps, rms, dropout_p, threads): tensors or None, any strides; the
// last `dims` dimensions are the row. `summed`: x is the sum already. See params.h.
void bind(pybind11::module_& m);

}  // namespace fused_attn::layer_norm
