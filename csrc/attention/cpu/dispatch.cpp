#include "attention/cpu/dispatch.h"

#include "cpu/dispatch.h"

namespace fused_attn::attention {

thread_local int64_t last_decode_parts = 0;

FUSED_ATTN_CPU_KERNEL(forward, Params)
FUSED_ATTN_CPU_KERNEL(forward_with_weights, WeightsParams)
FUSED_ATTN_CPU_KERNEL(backward, BackwardParams)

}  // namespace fused_attn::attention
