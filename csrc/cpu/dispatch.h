// From an operation to its CPU kernels. In namespace fused_attn::<operation>
//
//   FUSED_ATTN_CPU_KERNEL(forward, Params)
//
// declares `void forward(const Params&)` in the namespace of every level, where the operation's
// kernel source defines it, and defines `void forward_cpu(const Params&)`, which runs that of the
// level that has kernels for the dtype of the problem. Repeated calls with one number of threads
// give bitwise equal results.
#pragma once

#include "cpu/level.h"

#define FUSED_ATTN_CPU_KERNEL(name, Params)                                              \
  FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_DECLARE_KERNEL, name, Params)                        \
  void name##_cpu(const Params& params) {                                                \
    using Kernel = void (*)(const Params&);                                              \
    constexpr Kernel kernels[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_NAME_KERNEL, name)}; \
    kernels[static_cast<int>(kernel_level(params.dtype))](params);                       \
  }
#define FUSED_ATTN_DECLARE_KERNEL(level, name, Params) \
  namespace level {                                    \
  void name(const Params& params);                     \
  }
#define FUSED_ATTN_NAME_KERNEL(level, name) level::name,
