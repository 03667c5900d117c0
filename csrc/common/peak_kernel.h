#pragma once

#include <cstdint>

#include "common/types.h"

#define FUSED_ATTN_DECLARE_PEAK(level)                \
  namespace fused_attn::level {                       \
  double multiply_adds(DType dtype, int64_t repeats); \
  }
FUSED_ATTN_DECLARE_PEAK(portable)
FUSED_ATTN_DECLARE_PEAK(avx2)
FUSED_ATTN_DECLARE_PEAK(avx512)
FUSED_ATTN_DECLARE_PEAK(avx512_bf16)
#undef FUSED_ATTN_DECLARE_PEAK
