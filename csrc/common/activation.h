// The activations by which feed-forwards are made; `csrc/cpu/activation.h` computes them.
#pragma once

#include <string>

namespace fused_attn {

enum class Activation : int { kRelu, kGelu, kGeluTanh, kSilu };

// The activation called `name`. Throws std::invalid_argument if there is none.
Activation activation_of(const std::string& name);

}  // namespace fused_attn
