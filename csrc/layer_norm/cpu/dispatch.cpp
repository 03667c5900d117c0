#include "layer_norm/cpu/dispatch.h"

#include "cpu/dispatch.h"

namespace fused_attn::layer_norm {

FUSED_ATTN_CPU_KERNEL(forward, Params)
FUSED_ATTN_CPU_KERNEL(backward, BackwardParams)

}  // namespace fused_attn::layer_norm
