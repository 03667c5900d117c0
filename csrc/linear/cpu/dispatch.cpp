#include "linear/cpu/dispatch.h"

#include "cpu/dispatch.h"

namespace fused_attn::linear {

FUSED_ATTN_CPU_KERNEL(forward, Params)
FUSED_ATTN_CPU_KERNEL(backward, BackwardParams)

}  // namespace fused_attn::linear
