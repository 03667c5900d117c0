#include "common/activation.h"

#include "common/tensor.h"

namespace fused_attn {

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  fail_check("activation", "be relu, gelu, gelu_tanh or silu", name);
}

}  // namespace fused_attn
