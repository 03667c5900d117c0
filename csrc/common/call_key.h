// The key under which Python remembers what a call comes to.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn {

// Defines call_key() in the module, and asks torch for what it needs.
void bind_call_key(pybind11::module_& m);

}  // namespace fused_attn
