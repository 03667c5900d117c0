// Attention on NVIDIA GPUs of compute capability 9.0, and on the emulator.
#pragma once

#include "attention/params.h"

namespace fused_attn::attention {

// Launches on `stream` of the current device. Throws std::runtime_error if a launch fails.
void forward_cuda(const Params& p, void* stream);

struct BackwardWay {
  // dq (and dbias) in the kernel of dk and dv, five products, sums in any order; else in a kernel
  // of their own, seven products, deterministic.
  bool add_up_dq = false;
  // dq and dbias by their own kernel of these heads only, counted over the batch; 0 = of all. Calls
  // after the one with the first head find the row statistics in the workspace.
  int first_head = 0, head_count = 0;
};

// `workspace`: at least backward_workspace(p, add_up_dq) float32 numbers, 16-byte aligned.
void backward_cuda(const BackwardParams& p, const BackwardWay& way, float* workspace, void* stream);
int64_t backward_workspace(const Params& p, bool add_up_dq);

}  // namespace fused_attn::attention
