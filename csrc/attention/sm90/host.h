// From Params to what the GPU kernels take.
#pragma once

#include "attention/params.h"
#include "attention/sm90/dq_sum.h"
#include "cuda/launch.h"

namespace fused_attn::attention {

DeviceProblem device_problem(const Params& p);

// Memory of the backward: row statistics, (num_heads, rows) each, and the sum of dq, which is null
// if dq is not added up.
struct Workspace {
  float* lse2;
  float* delta;
  float* dq_sum;
  int64_t rows;
};
int64_t statistics_rows(const Params& p);

BackwardProblem backward_problem(const BackwardParams& p, const Workspace& workspace);

// Ragged tensor maps of q, out and their gradients, and of k, v and theirs, for tiles of
// `box_rows`.
TensorMap query_map(const Params& p, const View4& view, int64_t columns, int box_rows);
TensorMap key_map(const Params& p, const View4& view, int64_t columns, int box_rows);

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
