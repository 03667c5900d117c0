// What is asked of every call: the key under which Python remembers what it comes to, and whether
// its backward is an ordinary one.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn {

// Defines call_key(), launch_key() and backward_is_plain() in the module, and asks torch for what
// it needs.
void bind_call_key(pybind11::module_& m);

}  // namespace fused_attn
