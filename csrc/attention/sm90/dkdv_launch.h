// Chooses a kernel of dkdv.h for a problem and launches it; files per element type, with dq
// and without, instantiate it.
#pragma once

#include <algorithm>
#include <stdexcept>

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

template <class Tile>
void launch_dkdv_tile(const BackwardParams& p, const BackwardProblem& problem,
                      device::Stream stream) {
  DkDvMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Tile::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Tile::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Tile::kBlockN);
  maps.dout = query_map(p, p.dout, p.head_dim_v, Tile::kBlockM);
  const bool dk = problem.dk_by_tile && p.dk.data != nullptr;
  const bool dv = problem.dv_by_tile && p.dv.data != nullptr;
  maps.dk = dk ? key_map(p, p.dk, p.head_dim, 64) : maps.k;
  maps.dv = dv ? key_map(p, p.dv, p.head_dim_v, 64) : maps.v;
  const int64_t key_blocks = (p.seqlen_k + Tile::kBlockN - 1) / Tile::kBlockN;
  const device::LaunchShape shape{
      Tile::kDq ? "attention_backward (dq, dk, dv)" : "attention_backward (dk, dv)",
      key_blocks * p.num_heads_kv * p.batch, Tile::kThreads, Tile::kSharedBytes,
      Tile::kLaunchRegisters};
  device::launch(&dkdv_kernel<Tile>, shape, stream, maps, problem);
  if constexpr (Tile::kDq) {
    if (p.dq.data == nullptr) return;
    launch_convert_dq<typename Tile::Element>(p, problem, Tile::kBlockM, stream);
  }
}

template <class Element, int kHeadDim, bool kDq>
void launch_dkdv_of(const BackwardParams& p, const BackwardProblem& problem,
                    device::Stream stream) {
  if (problem.general) {
    launch_dkdv_tile<DkDvTile<Element, kHeadDim, true, kDq>>(p, problem, stream);
  } else {
    launch_dkdv_tile<DkDvTile<Element, kHeadDim, false, kDq>>(p, problem, stream);
  }
}

template <class Element, bool kDq>
void launch_dkdv(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return launch_dkdv_of<Element, 64, kDq>(p, problem, stream);
  if (head_dim <= 96) return launch_dkdv_of<Element, 96, kDq>(p, problem, stream);
  if (head_dim <= 128) return launch_dkdv_of<Element, 128, kDq>(p, problem, stream);
  if (head_dim <= 192) return launch_dkdv_of<Element, 192, kDq>(p, problem, stream);
  if (head_dim <= 256) return launch_dkdv_of<Element, 256, kDq>(p, problem, stream);
  throw std::runtime_error("attention_backward (dk, dv): head sizes above 256 have no kernel");
}

}  // namespace fused_attn::attention
