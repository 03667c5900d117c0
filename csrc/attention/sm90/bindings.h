#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::attention {

void bind_attention_cuda(pybind11::module_& m);

}  // namespace fused_attn::attention
