#include "embedding/cpu.h"

#include "common/cpu_level.h"

#define FUSED_ATTN_DECLARE(level)                                   \
  namespace fused_attn::level {                                     \
  void embedding_forward(const embedding::Params& params);          \
  void embedding_backward(const embedding::BackwardParams& params); \
  }
FUSED_ATTN_DECLARE(portable)
#if defined(FUSED_ATTN_X86_LEVELS)
FUSED_ATTN_DECLARE(avx2)
FUSED_ATTN_DECLARE(avx512)
FUSED_ATTN_DECLARE(avx512_bf16)
#endif

namespace fused_attn::embedding {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*backward)(const BackwardParams&);
};

// Indexed by CpuLevel.
constexpr Kernels kKernels[] = {
    {portable::embedding_forward, portable::embedding_backward},
#if defined(FUSED_ATTN_X86_LEVELS)
    {avx2::embedding_forward, avx2::embedding_backward},
    {avx512::embedding_forward, avx512::embedding_backward},
    {avx512_bf16::embedding_forward, avx512_bf16::embedding_backward},
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

}  // namespace fused_attn::embedding
