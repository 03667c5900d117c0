// Chooses a forward kernel for a problem and launches it; instantiated in a file per element type,
// so that they compile side by side.
#pragma once

#include "attention/sm90/forward.h"
#include "attention/sm90/host.h"

namespace fused_attn::attention {
// 64: three warpgroups fill the matrix unit while others take exponentials; with more to do for
// each score they would not have the registers. 192 and 256: one warpgroup's products take long
// enough.
template <class Element, int kHeadDim, bool kGeneral>
struct ForwardConfigOf;
template <class E, bool kGeneral>
struct ForwardConfigOf<E, 64, kGeneral>
    : ForwardConfig<E, 64, kGeneral ? 2 : 3, 128, true, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardConfigOf<E, 96, kGeneral> : ForwardConfig<E, 96, 2, 128, true, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardConfigOf<E, 128, kGeneral> : ForwardConfig<E, 128, 2, 128, true, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardConfigOf<E, 192, kGeneral> : ForwardConfig<E, 192, 2, 96, false, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardConfigOf<E, 256, kGeneral> : ForwardConfig<E, 256, 2, 64, false, kGeneral> {};

template <class Config>
void launch_forward_config(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  ForwardMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Config::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Config::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Config::kBlockN);
  maps.out = problem.out_by_tile ? query_map(p, p.out, p.head_dim_v, 64) : maps.q;
  const int64_t row_blocks = (p.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  const device::LaunchShape shape{"attention_forward", row_blocks * p.num_heads * p.batch,
                                  Config::kThreads, Config::kSharedBytes, Config::kLaunchRegisters};
  device::launch(&forward_kernel<Config>, shape, stream, maps, problem);
}

template <class Element, int kHeadDim>
void forward_of(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  if (problem.general) {
    launch_forward_config<ForwardConfigOf<Element, kHeadDim, true>>(p, problem, stream);
  } else {
    launch_forward_config<ForwardConfigOf<Element, kHeadDim, false>>(p, problem, stream);
  }
}

template <class Element>
void launch_forward(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  with_head_size(p, "attention_forward", [&](auto head_size) {
    forward_of<Element, decltype(head_size)::value>(p, problem, stream);
  });
}

}  // namespace fused_attn::attention
