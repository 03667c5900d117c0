// A torch tensor as C++ sees it: pointer, dtype, device, shape and strides, read from the Python
// object without linking libtorch. Only the bindings include this file; kernels take raw pointers.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "common/types.h"

namespace fused_attn {

enum class DeviceType : int { kCPU, kCUDA, kOther };

// Valid for the call that made it: it keeps no reference to the tensor.
struct TensorView {
  static constexpr int kMaxDims = 8;

  const char* name = "";  // of the argument, for messages
  void* data = nullptr;   // nullptr = absent; never nullptr for a tensor, even for an empty one
  DType dtype = DType::kFloat32;
  DeviceType device_type = DeviceType::kCPU;
  int device_id = 0;
  int ndim = 0;
  int64_t shape[kMaxDims];   // only the first `ndim` of each are set
  int64_t stride[kMaxDims];  // elements

  explicit operator bool() const { return data != nullptr; }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// `object` is a torch.Tensor of any subclass, or None for an absent one.
TensorView tensor_view(pybind11::handle object, const char* name);

// Whether it is a tensor or parameter of torch's own, not of a subclass.
bool is_plain_tensor(pybind11::handle object);

// The first dimensions of the view are those of the tensor; the rest, and every dimension of size
// 1, get stride 0. An absent tensor gives an absent view.
View4 view4(const TensorView& tensor);

// Each of these accepts an absent tensor and raises ValueError for one that does not fit. The
// Python side validates what users pass, so a failure here is a mistake inside the package.
constexpr int64_t kAnySize = -1;
void check_shape(const TensorView& tensor, std::initializer_list<int64_t> expected);
void check_dtype(const TensorView& tensor, std::initializer_list<DType> expected);
void check_contiguous(const TensorView& tensor);
void check_device(const TensorView& tensor, DeviceType type, int id = 0);
void check_present(const TensorView& tensor);

// The one place that words such a message: "`name` must ..., got ...".
[[noreturn]] void fail_check(const char* name, const std::string& expected, const std::string& got);

// Prepares the exchange with torch and defines use_exchange_api() and describe() in the module.
void bind_tensor(pybind11::module_& m);

}  // namespace fused_attn
