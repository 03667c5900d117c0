#pragma once

#include "bias_activation/params.h"

namespace fused_attn::bias_activation {

// Run on the level of instruction set that cpu/level.h chooses. Repeated calls with one
// number of threads give bitwise equal results.
void forward(const Params& params);
void backward(const BackwardParams& params);

}  // namespace fused_attn::bias_activation
