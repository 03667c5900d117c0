// Attention on NVIDIA GPUs of compute capability 9.0 (`cuda_*`), and on the emulator.
#pragma once

#include "attention/params.h"

namespace fused_attn::attention {

// Launches on `stream` of the current device. Throws std::runtime_error if a launch fails.
void forward_cuda(const Params& p, void* stream);

// `workspace`: at least backward_workspace(p) float32 numbers, 16-byte aligned.
void backward_cuda(const BackwardParams& p, float* workspace, void* stream);
int64_t backward_workspace(const Params& p);

}  // namespace fused_attn::attention
