// An operand as rows of equal width, in raw pointer, sizes and strides (elements).
#pragma once

#include "common/macros.h"
#include "common/types.h"

namespace fused_attn {

// A mixed-radix index: element i of these dimensions lies at offset(i). Neighbouring dimensions
// that lie evenly in memory are merged into one, so nearly always there is one or none.
struct Dims {
  static constexpr int kMax = 8;

  int count = 0;
  int64_t shape[kMax] = {};
  int64_t stride[kMax] = {};

  FUSED_ATTN_INLINE int64_t offset(int64_t index) const {
    if (count == 0) return 0;
    int64_t offset = 0;
    for (int d = count - 1; d > 0; --d) {
      offset += index % shape[d] * stride[d];
      index /= shape[d];
    }
    return offset + index * stride[0];
  }
  // Whether consecutive indices are neighbours in memory.
  FUSED_ATTN_INLINE bool dense() const { return count == 0 || (count == 1 && stride[0] == 1); }
};

// An operand as rows. `data == nullptr` means that it is absent.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Dims outer;  // leads to a row
  Dims inner;  // leads to an element of the row
};

}  // namespace fused_attn
