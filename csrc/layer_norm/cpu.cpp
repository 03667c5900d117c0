#include "layer_norm/cpu.h"

#include "common/cpu_level.h"

#define FUSED_ATTN_DECLARE(level)                                     \
  namespace fused_attn::level {                                       \
  void layer_norm_forward(const layer_norm::Params& params);          \
  void layer_norm_backward(const layer_norm::BackwardParams& params); \
  }
FUSED_ATTN_DECLARE(portable)
#if defined(FUSED_ATTN_X86_LEVELS)
FUSED_ATTN_DECLARE(avx2)
FUSED_ATTN_DECLARE(avx512)
FUSED_ATTN_DECLARE(avx512_bf16)
#endif

namespace fused_attn::layer_norm {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*backward)(const BackwardParams&);
};

// Indexed by CpuLevel.
constexpr Kernels kKernels[] = {
    {portable::layer_norm_forward, portable::layer_norm_backward},
#if defined(FUSED_ATTN_X86_LEVELS)
    {avx2::layer_norm_forward, avx2::layer_norm_backward},
    {avx512::layer_norm_forward, avx512::layer_norm_backward},
    {avx512_bf16::layer_norm_forward, avx512_bf16::layer_norm_backward},
#endif
};

const Kernels& kernels(const Problem& problem) {
  return kKernels[static_cast<int>(kernel_level(problem.dtype))];
}

}  // namespace

void forward(const Params& params) {
  kernels(params).forward(params);
}

void backward(const BackwardParams& params) {
  kernels(params).backward(params);
}

}  // namespace fused_attn::layer_norm
