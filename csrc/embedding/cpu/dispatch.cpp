#include "embedding/cpu/dispatch.h"

#include "cpu/level.h"
#include "cpu/levels.h"

#define FUSED_ATTN_DECLARE(level)                                   \
  namespace fused_attn::level {                                     \
  void embedding_forward(const embedding::Params& params);          \
  void embedding_backward(const embedding::BackwardParams& params); \
  }
FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_DECLARE)

namespace fused_attn::embedding {
namespace {

struct Kernels {
  void (*forward)(const Params&);
  void (*backward)(const BackwardParams&);
};

// Indexed by CpuLevel.
#define FUSED_ATTN_KERNELS(level) {level::embedding_forward, level::embedding_backward},
constexpr Kernels kKernels[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_KERNELS)};

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
