#include "attention/cpu.h"

#include "attention/cpu_kernels.h"
#include "common/cpu_level.h"

namespace fused_attn::attention {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*backward)(const BackwardParams&);
  void (*weights)(const WeightsParams&);
};

constexpr Kernels kKernels[] = {
    {portable::forward, portable::backward, portable::weights},
#if defined(FUSED_ATTN_X86_LEVELS)
    {avx2::forward, avx2::backward, avx2::weights},
    {avx512::forward, avx512::backward, avx512::weights},
    {avx512_bf16::forward, avx512_bf16::backward, avx512_bf16::weights},
#endif
};

const Kernels& kernels(const Params& p) {
  return kKernels[static_cast<int>(kernel_level(p.dtype))];
}

}  // namespace

void forward_cpu(const Params& p) {
  kernels(p).forward(p);
}
void backward_cpu(const BackwardParams& p) {
  kernels(p).backward(p);
}
void weights_cpu(const WeightsParams& p) {
  kernels(p).weights(p);
}

}  // namespace fused_attn::attention
