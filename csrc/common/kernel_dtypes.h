// Which dtypes have kernels of their own at which instruction-set level. A level that computes a
// dtype no better than the level below does not compile it again: the kernels of that one run.
#pragma once

#include "common/macros.h"
#include "common/types.h"

namespace fused_attn {

// The highest level (its number in cpu_level.h) with kernels for problems of this dtype. float64
// gains little beyond avx2; only bfloat16 has instructions that avx512 lacks.
FUSED_ATTN_INLINE constexpr int highest_kernel_level(DType dtype) {
  return dtype == DType::kFloat64 ? 1 : dtype == DType::kBFloat16 ? 3 : 2;
}

#if defined(FUSED_ATTN_LEVEL)
namespace FUSED_ATTN_LEVEL {
// Does this level have kernels for problems of this dtype?
FUSED_ATTN_INLINE constexpr bool has_kernels(DType dtype) {
  return FUSED_ATTN_LEVEL_ID <= highest_kernel_level(dtype);
}
}  // namespace FUSED_ATTN_LEVEL
#endif

}  // namespace fused_attn
