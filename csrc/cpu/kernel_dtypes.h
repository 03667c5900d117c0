// Which dtypes have kernels of their own at which instruction-set level. A level that computes a
// dtype no better than the level below does not compile it again: the kernels of that one run.
#pragma once

#include "common/macros.h"
#include "common/types.h"

namespace fused_attn {

// Does this level (its number in cpu/level.h) have kernels for problems of this dtype? In float64
// the portable ones beat avx2's; only bfloat16 has instructions that avx512 lacks.
FUSED_ATTN_INLINE constexpr bool level_has_kernels(int level, DType dtype) {
  if (level == 1) return dtype != DType::kFloat64;
  if (level == 3) return dtype == DType::kBFloat16;
  return true;
}

#if defined(FUSED_ATTN_LEVEL)
namespace FUSED_ATTN_LEVEL {
// Does this level have kernels for problems of this dtype?
FUSED_ATTN_INLINE constexpr bool has_kernels(DType dtype) {
  return level_has_kernels(FUSED_ATTN_LEVEL_ID, dtype);
}
}  // namespace FUSED_ATTN_LEVEL
#endif

}  // namespace fused_attn
