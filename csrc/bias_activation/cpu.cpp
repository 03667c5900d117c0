#include "bias_activation/cpu.h"

#include "common/cpu_level.h"

#define FUSED_ATTN_DECLARE(level)                                               \
  namespace fused_attn::level {                                                 \
  void bias_activation_forward(const bias_activation::Params& params);          \
  void bias_activation_backward(const bias_activation::BackwardParams& params); \
  }
FUSED_ATTN_DECLARE(portable)
#if defined(FUSED_ATTN_X86_LEVELS)
FUSED_ATTN_DECLARE(avx2)
FUSED_ATTN_DECLARE(avx512)
FUSED_ATTN_DECLARE(avx512_bf16)
#endif

namespace fused_attn::bias_activation {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*backward)(const BackwardParams&);
};

// Indexed by CpuLevel.
constexpr Kernels kKernels[] = {
    {portable::bias_activation_forward, portable::bias_activation_backward},
#if defined(FUSED_ATTN_X86_LEVELS)
    {avx2::bias_activation_forward, avx2::bias_activation_backward},
    {avx512::bias_activation_forward, avx512::bias_activation_backward},
    {avx512_bf16::bias_activation_forward, avx512_bf16::bias_activation_backward},
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

}  // namespace fused_attn::bias_activation
