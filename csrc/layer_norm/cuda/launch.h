// Norms on NVIDIA GPUs from compute capability 8.0 on, and on the emulator.
#pragma once

#include "layer_norm/params.h"

namespace fused_attn::layer_norm {

// Problems of dense rows, all of one type but for the parameters, which may be float32. Both
// launch on `stream` of the current device and throw std::runtime_error if that fails.
void forward_cuda(const Params& p, void* stream);

// `workspace`: 2 * backward_parts(p) * width float32 numbers, 16-byte aligned.
void backward_cuda(const BackwardParams& p, float* workspace, void* stream);
int64_t backward_parts(const Problem& p);

}  // namespace fused_attn::layer_norm
