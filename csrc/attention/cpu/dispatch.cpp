#include "attention/cpu/dispatch.h"

#include "attention/cpu/kernels.h"
#include "cpu/level.h"

namespace fused_attn::attention {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*forward_with_weights)(const WeightsParams&);
  void (*backward)(const BackwardParams&);
};

// Indexed by CpuLevel.
#define FUSED_ATTN_KERNELS(level) {level::forward, level::forward_with_weights, level::backward},
constexpr Kernels kKernels[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_KERNELS)};

const Kernels& kernels(const Params& p) {
  return kKernels[static_cast<int>(kernel_level(p.dtype))];
}

}  // namespace

void forward_cpu(const Params& p) {
  kernels(p).forward(p);
}
void forward_with_weights_cpu(const WeightsParams& p) {
  kernels(p).forward_with_weights(p);
}
void backward_cpu(const BackwardParams& p) {
  kernels(p).backward(p);
}

}  // namespace fused_attn::attention
