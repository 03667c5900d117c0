// Chooses a kernel of dq.h for a problem and launches it; a file per element type instantiates
// it.
#pragma once

#include "attention/sm90/delta.h"
#include "attention/sm90/dq.h"
#include "attention/sm90/host.h"

namespace fused_attn::attention {

template <class Element>
void launch_delta(const Params& p, const BackwardProblem& problem, device::Stream stream) {
  const int64_t tiles = (p.seqlen_q + kStatisticsTile - 1) / kStatisticsTile;
  const device::LaunchShape shape{"attention_backward (delta)",
                                  tiles * (kStatisticsTile / kDeltaRows) * p.num_heads * p.batch,
                                  kDeltaThreads, 0, 0};
  device::launch(&delta_kernel<Element>, shape, stream, problem);
}

template <class Config>
void launch_dq_config(const BackwardParams& p, const BackwardProblem& problem,
                      device::Stream stream) {
  DqMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Config::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Config::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Config::kBlockN);
  maps.dout = query_map(p, p.dout, p.head_dim_v, Config::kBlockM);
  maps.dq =
      problem.dq_by_tile && p.dq.data != nullptr ? query_map(p, p.dq, p.head_dim, 64) : maps.q;
  const int64_t row_blocks = (p.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  const device::LaunchShape shape{"attention_backward (dq)", row_blocks * problem.head_count,
                                  Config::kThreads, Config::kSharedBytes, Config::kLaunchRegisters};
  device::launch(&dq_kernel<Config>, shape, stream, maps, problem);
}

template <class Element, int kHeadDim>
void launch_dq_of(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  if (problem.general) {
    launch_dq_config<DqConfig<Element, kHeadDim, true>>(p, problem, stream);
  } else {
    launch_dq_config<DqConfig<Element, kHeadDim, false>>(p, problem, stream);
  }
}

template <class Element>
void launch_dq(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  with_head_size(p, "attention_backward (dq)", [&](auto head_size) {
    launch_dq_of<Element, decltype(head_size)::value>(p, problem, stream);
  });
}

}  // namespace fused_attn::attention
