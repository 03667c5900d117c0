// From Params to what the GPU kernels take.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/params.h"
#include "attention/sm90/dq_sum.h"
#include "cuda/launch.h"

namespace fused_attn::attention {

DeviceProblem device_problem(const Params& p);

// Memory of the backward: row statistics, (num_heads, rows) each, and the sum of dq, which is null
// if dq is not added up.
struct Workspace {
  float* lse2;
  float* base;
  float* delta;
  float* dq_sum;
  int64_t rows;
};
int64_t statistics_rows(const Params& p);

BackwardProblem backward_problem(const BackwardParams& p, const Workspace& workspace);

// Tensor maps of q, out and their gradients, and of k, v and theirs, for tiles of
// `box_rows`.
TensorMap query_map(const Params& p, const View4& view, int64_t columns, int box_rows);
TensorMap key_map(const Params& p, const View4& view, int64_t columns, int box_rows);

// Calls call(constant) with the smallest head size of the kernels that holds the problem's.
template <class Call>
void with_head_size(const Params& p, const char* kernel, const Call& call) {
  const int64_t head_dim = std::max(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return call(std::integral_constant<int, 64>());
  if (head_dim <= 96) return call(std::integral_constant<int, 96>());
  if (head_dim <= 128) return call(std::integral_constant<int, 128>());
  if (head_dim <= 192) return call(std::integral_constant<int, 192>());
  if (head_dim <= 256) return call(std::integral_constant<int, 256>());
  throw std::runtime_error(std::string(kernel) + ": head sizes above 256 have no kernel");
}

// Launchers by element type: each is compiled in files of its own.
template <class Element>
void launch_forward(const Params& p, const DeviceProblem& problem, device::Stream stream);
template <class Element>
void launch_delta(const Params& p, const BackwardProblem& problem, device::Stream stream);
template <class Element>
void launch_dq(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream);
// `kDq`: adds dq up and converts it, and dbias.
template <class Element, bool kDq>
void launch_dkdv(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream);

}  // namespace fused_attn::attention
