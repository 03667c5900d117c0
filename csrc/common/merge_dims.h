// A tensor's dimensions as those of an operand of rows.
#pragma once

#include "common/row_view.h"

namespace fused_attn {

// Dimensions [begin, end), neighbours merged where one stride leads through both.
inline Dims merge_dims(const int64_t* shape, const int64_t* strides, int begin, int end) {
  Dims dims;
  for (int d = begin; d < end; ++d) {
    const int64_t size = shape[d], stride = strides[d];
    if (size == 1) continue;
    if (dims.count > 0 && dims.stride[dims.count - 1] == size * stride) {
      dims.shape[dims.count - 1] *= size;
      dims.stride[dims.count - 1] = stride;
    } else {
      dims.shape[dims.count] = size;
      dims.stride[dims.count++] = stride;
    }
  }
  return dims;
}

}  // namespace fused_attn
