// Attention on the CPU, at the instruction-set level of cpu/level.h.
#pragma once

#include "attention/params.h"

namespace fused_attn::attention {

void forward_cpu(const Params& params);
void backward_cpu(const BackwardParams& params);
void forward_with_weights_cpu(const WeightsParams& params);

}  // namespace fused_attn::attention
