// Chooses a forward kernel for a problem and launches it; instantiated in a file per element type,
// so that they compile side by side.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "attention/sm90/forward.h"
#include "attention/sm90/host.h"

namespace fused_attn::attention {
// 64: three warpgroups fill the matrix unit while others take exponentials; with more to do for
// each score they would not have the registers. 192 and 256: one warpgroup's products take long
// enough.
template <class Element, int kHeadDim, bool kGeneral>
struct ForwardTileOf;
template <class E, bool kGeneral>
struct ForwardTileOf<E, 64, kGeneral> : ForwardTile<E, 64, kGeneral ? 2 : 3, 128, true, kGeneral> {
};
template <class E, bool kGeneral>
struct ForwardTileOf<E, 96, kGeneral> : ForwardTile<E, 96, 2, 128, true, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardTileOf<E, 128, kGeneral> : ForwardTile<E, 128, 2, 128, true, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardTileOf<E, 192, kGeneral> : ForwardTile<E, 192, 2, 96, false, kGeneral> {};
template <class E, bool kGeneral>
struct ForwardTileOf<E, 256, kGeneral> : ForwardTile<E, 256, 2, 64, false, kGeneral> {};

template <class Tile>
void launch_forward_tile(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  ForwardMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Tile::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Tile::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Tile::kBlockN);
  maps.out = problem.out_by_tile ? query_map(p, p.out, p.head_dim_v, 64) : maps.q;
  const int64_t row_blocks = (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
  const device::LaunchShape shape{"attention_forward", row_blocks * p.num_heads * p.batch,
                                  Tile::kThreads, Tile::kSharedBytes, Tile::kLaunchRegisters};
  device::launch(&forward_kernel<Tile>, shape, stream, maps, problem);
}

template <class Element, int kHeadDim>
void forward_of(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  if (problem.general) {
    launch_forward_tile<ForwardTileOf<Element, kHeadDim, true>>(p, problem, stream);
  } else {
    launch_forward_tile<ForwardTileOf<Element, kHeadDim, false>>(p, problem, stream);
  }
}

template <class Element>
void launch_forward(const Params& p, const DeviceProblem& problem, device::Stream stream) {
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return forward_of<Element, 64>(p, problem, stream);
  if (head_dim <= 96) return forward_of<Element, 96>(p, problem, stream);
  if (head_dim <= 128) return forward_of<Element, 128>(p, problem, stream);
  if (head_dim <= 192) return forward_of<Element, 192>(p, problem, stream);
  if (head_dim <= 256) return forward_of<Element, 256>(p, problem, stream);
  throw std::runtime_error("attention_forward: head sizes above 256 have no kernel");
}

}  // namespace fused_attn::attention
