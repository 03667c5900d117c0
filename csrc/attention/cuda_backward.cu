// Launches the kernels of the attention backward: delta, then dq, dk and dv.
#include <algorithm>
#include <stdexcept>

#include "attention/cuda.h"
#include "attention/cuda_backward.h"
#include "attention/cuda_delta.h"
#include "attention/cuda_dkdv.h"
#include "attention/cuda_dq.h"
#include "attention/cuda_host.h"

namespace fused_attn::attention {
namespace {

template <class Element>
void launch_delta(const Params& p, const BackwardProblem& problem, device::Stream stream) {
  const int64_t tiles = (p.seqlen_q + kStatisticsTile - 1) / kStatisticsTile;
  const device::LaunchShape shape{"attention_backward (delta)",
                                  tiles * (kStatisticsTile / kDeltaRows) * p.num_heads * p.batch,
                                  kDeltaThreads, 0, 0};
  device::launch(&delta_kernel<Element>, shape, stream, problem);
}

template <class Tile>
void launch_dq(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  DqMaps maps;
  maps.q = query_map(p, p.q, p.head_dim, Tile::kBlockM);
  maps.k = key_map(p, p.k, p.head_dim, Tile::kBlockN);
  maps.v = key_map(p, p.v, p.head_dim_v, Tile::kBlockN);
  maps.dout = query_map(p, p.dout, p.head_dim_v, Tile::kBlockM);
  maps.dq =
      problem.dq_by_tile && p.dq.data != nullptr ? query_map(p, p.dq, p.head_dim, 64) : maps.q;
  const int64_t row_blocks = (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
  const device::LaunchShape shape{"attention_backward (dq)", row_blocks * p.num_heads * p.batch,
                                  Tile::kThreads, Tile::kSharedBytes, Tile::kLaunchRegisters};
  device::launch(&dq_kernel<Tile>, shape, stream, maps, problem);
}

template <class Tile>
void launch_dkdv(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
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
  const device::LaunchShape shape{"attention_backward (dk, dv)",
                                  key_blocks * p.num_heads_kv * p.batch, Tile::kThreads,
                                  Tile::kSharedBytes, Tile::kLaunchRegisters};
  device::launch(&dkdv_kernel<Tile>, shape, stream, maps, problem);
}

template <class Element, int kHeadDim, bool kGeneral>
void backward_of(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  const bool queries = p.batch * p.seqlen_q > 0, keys = p.batch * p.seqlen_k > 0;
  if (queries) launch_delta<Element>(p, problem, stream);
  if (queries && (p.dq.data != nullptr || p.dbias.data != nullptr)) {
    launch_dq<DqTile<Element, kHeadDim, kGeneral>>(p, problem, stream);
  }
  if (keys && (p.dk.data != nullptr || p.dv.data != nullptr)) {
    launch_dkdv<DkDvTile<Element, kHeadDim, kGeneral>>(p, problem, stream);
  }
}

template <class Element, int kHeadDim>
void backward_of(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  if (problem.general) {
    backward_of<Element, kHeadDim, true>(p, problem, stream);
  } else {
    backward_of<Element, kHeadDim, false>(p, problem, stream);
  }
}

template <class Element>
void backward_in(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return backward_of<Element, 64>(p, problem, stream);
  if (head_dim <= 96) return backward_of<Element, 96>(p, problem, stream);
  if (head_dim <= 128) return backward_of<Element, 128>(p, problem, stream);
  if (head_dim <= 192) return backward_of<Element, 192>(p, problem, stream);
  if (head_dim <= 256) return backward_of<Element, 256>(p, problem, stream);
  throw std::runtime_error("attention_backward: head sizes above 256 have no kernel");
}

}  // namespace

int64_t backward_workspace(const Params& p) {
  return 2 * p.num_heads * statistics_rows(p);
}

void backward_cuda(const BackwardParams& p, float* workspace, void* stream) {
  const int64_t rows = statistics_rows(p);
  const BackwardProblem problem =
      backward_problem(p, {workspace, workspace + p.num_heads * rows, rows});
  if (p.dtype == DType::kBFloat16) return backward_in<device::BFloat16>(p, problem, stream);
  return backward_in<device::Float16>(p, problem, stream);
}

}  // namespace fused_attn::attention
