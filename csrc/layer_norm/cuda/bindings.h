#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::layer_norm {

void bind_cuda(pybind11::module_& m);

}  // namespace fused_attn::layer_norm
