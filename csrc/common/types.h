// Plain descriptions of tensors, shared by every operation and every device.
// Nothing here knows torch or Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_attn {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64, kBool, kInt32, kInt64 };

// A 4-D operand as the kernels see it. Strides count elements; a stride of 0 is a broadcast
// dimension. `data == nullptr` means that the operand is absent.
struct View4 {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};
};

}  // namespace fused_attn
