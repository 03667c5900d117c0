#pragma once

#include "linear/params.h"

namespace fused_attn::linear {

// At the instruction-set level of cpu/level.h.
void forward_cpu(const Params& params);
void backward_cpu(const BackwardParams& params);

}  // namespace fused_attn::linear
