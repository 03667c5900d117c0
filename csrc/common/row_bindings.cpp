#include "common/row_bindings.h"

#include <string>

#include "common/merge_dims.h"

namespace fused_attn {

Rows rows(const TensorView& tensor, int dims) {
  if (!tensor) return {};
  check_device(tensor, DeviceType::kCPU);
  check_dtype(tensor, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  const int outer = tensor.ndim - dims;
  if (outer < 0) {
    fail_check(tensor.name, "have at least " + std::to_string(dims) + " dimensions",
               std::to_string(tensor.ndim));
  }
  return {tensor.data, tensor.dtype, merge_dims(tensor.shape, tensor.stride, 0, outer),
          merge_dims(tensor.shape, tensor.stride, outer, tensor.ndim)};
}

int64_t size(const TensorView& tensor, int begin, int end) {
  int64_t size = 1;
  for (int d = begin; d < end; ++d) size *= tensor.shape[d];
  return size;
}

void check_same_shape(const TensorView& tensor, const TensorView& like, int first) {
  if (!tensor) return;
  bool same = tensor.ndim == like.ndim - first;
  for (int d = 0; same && d < tensor.ndim; ++d) same = tensor.shape[d] == like.shape[first + d];
  if (!same)
    fail_check(tensor.name, std::string("have the shape of `") + like.name + "`", "another");
}

const int64_t* dropout_rng(const TensorView& rng) {
  check_dtype(rng, {DType::kInt64});
  check_shape(rng, {2});
  check_contiguous(rng);
  return rng.as<const int64_t>();
}

}  // namespace fused_attn
