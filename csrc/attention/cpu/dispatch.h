// Attention on the CPU, at the instruction-set level of cpu/level.h.
#pragma once

#include "attention/params.h"

namespace fused_attn::attention {

void forward_cpu(const Params& params);
void backward_cpu(const BackwardParams& params);
void forward_with_weights_cpu(const WeightsParams& params);

// Into how many parts the last decoding of this thread split the keys. Tests ask: a merge of one
// part proves nothing.
extern thread_local int64_t last_decode_parts;

}  // namespace fused_attn::attention
