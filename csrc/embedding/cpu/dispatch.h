#pragma once

#include "embedding/params.h"

namespace fused_attn::embedding {

// Run on the level of instruction set that cpu/level.h chooses. Repeated calls with one
// number of threads give bitwise equal results.
void forward(const Params& params);
void backward(const BackwardParams& params);

}  // namespace fused_attn::embedding
