#include "attention/cpu/dispatch.h"

#include "cpu/dispatch.h"

namespace fused_attn::attention {

FUSED_ATTN_CPU_KERNEL(forward, Params)
FUSED_ATTN_CPU_KERNEL(forward_with_weights, WeightsParams)
FUSED_ATTN_CPU_KERNEL(backward, BackwardParams)

}  // namespace fused_attn::attention
