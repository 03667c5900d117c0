// The levels as numbers, and which dtypes have kernels of their own at which of them.
#pragma once

#include "common/macros.h"
#include "common/types.h"
#include "cpu/levels.h"

namespace fused_attn {

#define FUSED_ATTN_NAME(level, ...) level,
enum class CpuLevel : int { FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_NAME) };
#undef FUSED_ATTN_NAME

// Does this level have kernels for problems of this dtype?
FUSED_ATTN_INLINE constexpr bool level_has_kernels(CpuLevel level, DType dtype) {
#define FUSED_ATTN_HAS_DTYPE(level, ...) FUSED_ATTN_OF_LEVEL(DTYPES, level),
  const bool has[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_HAS_DTYPE)};
#undef FUSED_ATTN_HAS_DTYPE
  return (void)dtype, has[static_cast<int>(level)];
}

#if defined(FUSED_ATTN_LEVEL)
namespace FUSED_ATTN_LEVEL {
// Does this level have kernels for problems of this dtype?
FUSED_ATTN_INLINE constexpr bool has_kernels(DType dtype) {
  return level_has_kernels(CpuLevel::FUSED_ATTN_LEVEL, dtype);
}
}  // namespace FUSED_ATTN_LEVEL
#endif

}  // namespace fused_attn
