// Attention on NVIDIA GPUs of compute capability 9.0 (`cuda_*`), and on the emulator.
#pragma once

#include "attention/params.h"

namespace fused_attn::attention {

// Launches on `stream` of the current device. Throws std::runtime_error if a launch fails.
void forward_cuda(const Params& p, void* stream);

// `add_up_dq`: dq (and dbias) in the kernel of dk and dv, five products, sums in any order; else in
// a kernel of their own, seven products, deterministic. `workspace`: at least
// backward_workspace(p, add_up_dq) float32 numbers, 16-byte aligned.
void backward_cuda(const BackwardParams& p, bool add_up_dq, float* workspace, void* stream);
int64_t backward_workspace(const Params& p, bool add_up_dq);

}  // namespace fused_attn::attention
