// The part of DLPack's C exchange API (DLPack 1.2 and later, major version 1) that is used here:
// the table of functions that torch offers as `torch.Tensor.__dlpack_c_exchange_api__`.
#pragma once

#include <cstdint>

namespace fused_attn::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceCode : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kROCm = 10 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  ExchangeApi* previous;

  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills `out` with a view that lives as long as the object is untouched. Not null in torch, but
  // optional in the specification.
  int (*tensor_from_py_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace fused_attn::dlpack
