// Chooses a kernel of dq.h for a problem and launches it; a file per element type instantiates
// it.
#pragma once

#include <algorithm>
#include <stdexcept>

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

template <class Tile>
void launch_dq_tile(const BackwardParams& p, const BackwardProblem& problem,
                    device::Stream stream) {
  DqMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Tile::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Tile::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Tile::kBlockN);
  maps.dout = query_map(p, p.dout, p.head_dim_v, Tile::kBlockM);
  maps.dq =
      problem.dq_by_tile && p.dq.data != nullptr ? query_map(p, p.dq, p.head_dim, 64) : maps.q;
  const int64_t row_blocks = (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
  const device::LaunchShape shape{"attention_backward (dq)", row_blocks * problem.head_count,
                                  Tile::kThreads, Tile::kSharedBytes, Tile::kLaunchRegisters};
  device::launch(&dq_kernel<Tile>, shape, stream, maps, problem);
}

template <class Element, int kHeadDim>
void launch_dq_of(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  if (problem.general) {
    launch_dq_tile<DqTile<Element, kHeadDim, true>>(p, problem, stream);
  } else {
    launch_dq_tile<DqTile<Element, kHeadDim, false>>(p, problem, stream);
  }
}

template <class Element>
void launch_dq(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return launch_dq_of<Element, 64>(p, problem, stream);
  if (head_dim <= 96) return launch_dq_of<Element, 96>(p, problem, stream);
  if (head_dim <= 128) return launch_dq_of<Element, 128>(p, problem, stream);
  if (head_dim <= 192) return launch_dq_of<Element, 192>(p, problem, stream);
  if (head_dim <= 256) return launch_dq_of<Element, 256>(p, problem, stream);
  throw std::runtime_error("attention_backward (dq): head sizes above 256 have no kernel");
}

}  // namespace fused_attn::attention
