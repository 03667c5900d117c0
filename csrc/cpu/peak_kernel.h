#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/levels.h"

#define FUSED_ATTN_DECLARE_PEAK(level, ...)           \
  namespace fused_attn::level {                       \
  double multiply_adds(DType dtype, int64_t repeats); \
  }
FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_DECLARE_PEAK)
#undef FUSED_ATTN_DECLARE_PEAK
