// The kernels of the level at hand, for each other.
#pragma once

#include "attention/cpu/engine.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

void forward(const Params& p);
void forward_with_weights(const WeightsParams& p);
void backward(const BackwardParams& p);

// Starting threads pays from some 20 us of work. `products`: matrix products of the kernel,
// times 2.
FUSED_ATTN_INLINE int useful_threads(const Params& p, int products) {
  const double operations = static_cast<double>(products) * p.batch * p.num_heads * p.seqlen_q *
                            p.seqlen_k * (p.head_dim + p.head_dim_v) / 2;
  return operations < 2e6 ? 1 : larger(1, p.threads);
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
