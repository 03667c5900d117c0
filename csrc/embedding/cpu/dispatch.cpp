#include "embedding/cpu/dispatch.h"

#include "cpu/dispatch.h"

namespace fused_attn::embedding {

FUSED_ATTN_CPU_KERNEL(forward, Params)
FUSED_ATTN_CPU_KERNEL(backward, BackwardParams)

}  // namespace fused_attn::embedding
