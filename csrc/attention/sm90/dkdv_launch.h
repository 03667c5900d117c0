// Chooses a kernel of dkdv.h for a problem and launches it; files per element type, with dq
// and without, instantiate it.
#pragma once

#include "attention/sm90/dkdv.h"
#include "attention/sm90/host.h"

namespace fused_attn::attention {

template <class Element>
void launch_convert_dq(const BackwardParams& p, const BackwardProblem& problem, int block_m,
                       device::Stream stream) {
  const int64_t row_blocks = (p.seqlen_q + kConvertQueries - 1) / kConvertQueries;
  const int64_t column_blocks = (p.head_dim + kConvertColumns - 1) / kConvertColumns;
  const device::LaunchShape shape{"attention_backward (dq of its sum)",
                                  row_blocks * column_blocks * p.num_heads * p.batch,
                                  kConvertThreads, 0, 0};
  device::launch(&convert_dq_kernel<Element>, shape, stream, problem, block_m);
}

template <class Config>
void launch_dkdv_config(const BackwardParams& p, const BackwardProblem& problem,
                        device::Stream stream) {
  DkDvMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Config::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Config::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Config::kBlockN);
  maps.dout = query_map(p, p.dout, p.head_dim_v, Config::kBlockM);
  const bool dk = problem.dk_by_tile && p.dk.data != nullptr;
  const bool dv = problem.dv_by_tile && p.dv.data != nullptr;
  maps.dk = dk ? key_map(p, p.dk, p.head_dim, 64) : maps.k;
  maps.dv = dv ? key_map(p, p.dv, p.head_dim_v, 64) : maps.v;
  const int64_t key_blocks = (p.seqlen_k + Config::kBlockN - 1) / Config::kBlockN;
  const device::LaunchShape shape{
      Config::kDq ? "attention_backward (dq, dk, dv)" : "attention_backward (dk, dv)",
      key_blocks * p.num_heads_kv * p.batch, Config::kThreads, Config::kSharedBytes,
      Config::kLaunchRegisters};
  device::launch(&dkdv_kernel<Config>, shape, stream, maps, problem);
  if constexpr (Config::kDq) {
    if (p.dq.data == nullptr) return;
    launch_convert_dq<typename Config::Element>(p, problem, Config::kBlockM, stream);
  }
}

template <class Element, int kHeadDim, bool kDq>
void launch_dkdv_of(const BackwardParams& p, const BackwardProblem& problem,
                    device::Stream stream) {
  if (problem.general) {
    launch_dkdv_config<DkDvConfig<Element, kHeadDim, true, kDq>>(p, problem, stream);
  } else {
    launch_dkdv_config<DkDvConfig<Element, kHeadDim, false, kDq>>(p, problem, stream);
  }
}

template <class Element, bool kDq>
void launch_dkdv(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  with_head_size(p, "attention_backward (dk, dv)", [&](auto head_size) {
    launch_dkdv_of<Element, decltype(head_size)::value, kDq>(p, problem, stream);
  });
}

}  // namespace fused_attn::attention
