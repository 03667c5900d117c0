#include <algorithm>

#include "attention/sm90/host.h"
#include "attention/sm90/launch.h"
#include "cuda/map_cache.h"

namespace fused_attn::attention {
namespace {

// Larger than any length, and safe to add to one.
constexpr int kUnbounded = 1 << 30;

int bounded(int64_t value) {
  return static_cast<int>(std::clamp<int64_t>(value, -kUnbounded, kUnbounded));
}

DeviceView device_view(const View4& view) {
  DeviceView result;
  result.data = view.data;
  std::copy(view.stride, view.stride + 4, result.stride);
  result.wide = view.dtype == DType::kFloat32;
  return result;
}

// Can tiles be stored to it? The copy engine writes whole pieces of 16 bytes: where a row of the
// tensor ends within one, it would write over what comes next.
bool takes_tiles(const View4& view, int64_t columns) {
  return columns % 8 == 0 &&
         device::can_map(view.data, view.stride[0], view.stride[1], view.stride[2], view.stride[3]);
}

void set_dropout(const Params& p, DeviceProblem& d) {
  d.rng = p.dropout_p > 0 ? p.rng : nullptr;
  d.keep_scale = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
  d.keep_from = p.dropout_p < 1 ? static_cast<uint32_t>(p.dropout_p * 0x1p32) : ~0u;
  if (d.rng == nullptr) d.keep_scale = 1.0f;
}

// How many heads of `rows` rows the second-level cache holds.
int fit_together(const Params& p, int64_t rows, int64_t shared_by, int64_t heads) {
  const int64_t bytes = std::max<int64_t>(2 * rows * (p.head_dim + p.head_dim_v), 1);
  const int64_t together = device::kCacheBytes / bytes * shared_by;
  return static_cast<int>(std::clamp<int64_t>(together, 1, std::max<int64_t>(heads, 1)));
}

struct Extent {
  int64_t heads, rows;
};

TensorMap map_of(const Params& p, const View4& view, const Extent& extent, int64_t columns,
                 int box_rows) {
  device::MapRequest request;
  request.data = view.data;
  request.packed = p.cu_seqlens_q != nullptr;
  request.batch = request.packed ? 1 : p.batch;
  request.heads = extent.heads;
  request.rows = std::max<int64_t>(extent.rows, 1);  // a map cannot be empty
  request.columns = columns;
  request.stride_batch = view.stride[0];
  request.stride_head = view.stride[1];
  request.stride_row = view.stride[2];
  request.box_rows = box_rows;
  return device::cached_tensor_map(request);
}

}  // namespace

DeviceProblem device_problem(const Params& p) {
  DeviceProblem d = {};
  d.batch = static_cast<int>(p.batch);
  d.num_heads = static_cast<int>(p.num_heads);
  d.group = static_cast<int>(p.num_heads / p.num_heads_kv);
  d.seqlen_q = static_cast<int>(p.seqlen_q);
  d.seqlen_k = static_cast<int>(p.seqlen_k);
  d.rows_q = static_cast<int>(p.rows_q);
  d.rows_k = static_cast<int>(p.rows_k);
  d.head_dim = static_cast<int>(p.head_dim);
  d.head_dim_v = static_cast<int>(p.head_dim_v);
  d.low = p.window_left >= 0 ? -bounded(p.window_left) : -kUnbounded;
  d.high = p.window_right >= 0 ? bounded(p.window_right) : kUnbounded;
  if (p.causal != Causal::kNone) d.high = std::min(d.high, 0);
  d.aligned_right = p.causal != Causal::kUpperLeft;
  d.scale = static_cast<float>(p.scale);
  d.scale_log2 = d.scale * kLog2E;
  d.softcap = static_cast<float>(p.softcap);
  set_dropout(p, d);
  d.cu_seqlens_q = p.cu_seqlens_q;
  d.cu_seqlens_k = p.cu_seqlens_k;
  d.key_lengths = p.key_lengths;
  d.key_padding = p.key_padding_mask;
  std::copy(p.key_padding_stride, p.key_padding_stride + 2, d.key_padding_stride);
  d.alibi_slopes = p.alibi_slopes;
  d.bias = device_view(p.bias);
  d.mask = device_view(p.mask);
  d.key_bits = d.key_padding != nullptr || (d.mask.data != nullptr && d.seqlen_k <= kMaxKeyBits);
  d.head_count = static_cast<int>(p.batch * p.num_heads);
  d.heads_together = fit_together(p, p.seqlen_k, d.group, p.batch * p.num_heads);
  d.key_heads_together = fit_together(p, p.seqlen_q * d.group, 1, p.batch * p.num_heads_kv);
  d.out = device_view(p.out);
  d.out_by_tile = takes_tiles(p.out, p.head_dim_v);
  d.lse = static_cast<float*>(p.lse.data);
  std::copy(p.lse.stride, p.lse.stride + 3, d.lse_stride);
  // The running maximum is taken of q . k itself, which a scale that is not positive would turn.
  d.general = p.scale <= 0 || p.softcap > 0 || p.alibi_slopes != nullptr ||
              p.bias.data != nullptr || p.mask.data != nullptr || d.rng != nullptr;
  return d;
}

BackwardProblem backward_problem(const BackwardParams& p, const Workspace& workspace) {
  BackwardProblem d = {};
  static_cast<DeviceProblem&>(d) = device_problem(p);
  d.general = d.general || p.dbias.data != nullptr;
  d.lse2 = workspace.lse2;
  d.base = workspace.base;
  d.delta = workspace.delta;
  d.dq_sum = workspace.dq_sum;
  d.padded_rows = static_cast<int>(workspace.rows);
  d.result_out = device_view(p.out);
  d.dout = device_view(p.dout);
  d.forward_lse = static_cast<const float*>(p.lse.data);
  std::copy(p.lse.stride, p.lse.stride + 3, d.forward_lse_stride);
  d.dlse = static_cast<const float*>(p.dlse.data);
  std::copy(p.dlse.stride, p.dlse.stride + 3, d.dlse_stride);
  d.dq = device_view(p.dq);
  d.dk = device_view(p.dk);
  d.dv = device_view(p.dv);
  d.dq_by_tile = takes_tiles(p.dq, p.head_dim);
  d.dk_by_tile = takes_tiles(p.dk, p.head_dim);
  d.dv_by_tile = takes_tiles(p.dv, p.head_dim_v);
  d.dbias = static_cast<float*>(p.dbias.data);
  std::copy(p.dbias.stride, p.dbias.stride + 4, d.dbias_stride);
  const int64_t size[] = {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k};
  for (int i = 0; i < 4; ++i) {
    d.dbias_shared = d.dbias_shared || (d.dbias_stride[i] == 0 && size[i] > 1);
  }
  return d;
}

int64_t statistics_rows(const Params& p) {
  constexpr int64_t kTile = kStatisticsTile;
  if (p.cu_seqlens_q != nullptr) return (p.rows_q / kTile + p.batch + 1) * kTile;
  return p.batch * ((p.seqlen_q + kTile - 1) / kTile * kTile);
}

TensorMap query_map(const Params& p, const View4& view, int64_t columns, int box_rows) {
  return map_of(p, view, {p.num_heads, p.rows_q}, columns, box_rows);
}

TensorMap key_map(const Params& p, const View4& view, int64_t columns, int box_rows) {
  return map_of(p, view, {p.num_heads_kv, p.rows_k}, columns, box_rows);
}

namespace {

template <class Element>
void backward_in(const BackwardParams& p, const BackwardProblem& problem, device::Stream stream) {
  const bool queries = p.batch * p.seqlen_q > 0, keys = p.batch * p.seqlen_k > 0;
  // Of some heads after others, it is there already.
  if (queries && problem.first_head == 0) {
    launch_delta<Element>(p, problem, stream);
    DeviceProblem statistics = problem;
    statistics.head_count = problem.batch * problem.num_heads;
    launch_forward<Element>(p, statistics, stream);
  }
  if (problem.dq_sum != nullptr) return launch_dkdv<Element, true>(p, problem, stream);
  if (queries && (p.dq.data != nullptr || p.dbias.data != nullptr)) {
    launch_dq<Element>(p, problem, stream);
  }
  if (keys && (p.dk.data != nullptr || p.dv.data != nullptr)) {
    launch_dkdv<Element, false>(p, problem, stream);
  }
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (p.batch * p.num_heads * p.seqlen_q == 0) return;
  const DeviceProblem problem = device_problem(p);
  if (p.dtype == DType::kBFloat16) return launch_forward<device::BFloat16>(p, problem, stream);
  return launch_forward<device::Float16>(p, problem, stream);
}

int64_t backward_workspace(const Params& p, bool add_up_dq) {
  const int64_t columns = (p.head_dim + kSliceColumns - 1) / kSliceColumns * kSliceColumns;
  return (3 + (add_up_dq ? columns : 0)) * p.num_heads * statistics_rows(p);
}

void backward_cuda(const BackwardParams& p, const BackwardWay& way, float* workspace,
                   void* stream) {
  const int64_t rows = statistics_rows(p), numbers = p.num_heads * rows;
  BackwardProblem problem =
      backward_problem(p, {workspace, workspace + numbers, workspace + 2 * numbers,
                           way.add_up_dq ? workspace + 3 * numbers : nullptr, rows});
  if (way.head_count > 0) {
    problem.first_head = way.first_head;
    problem.head_count = way.head_count;
  }
  if (p.dtype == DType::kBFloat16) return backward_in<device::BFloat16>(p, problem, stream);
  return backward_in<device::Float16>(p, problem, stream);
}

}  // namespace fused_attn::attention
