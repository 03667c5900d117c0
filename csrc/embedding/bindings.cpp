#include "embedding/bindings.h"

#include <string>

#include "common/row_bindings.h"
#include "common/tensor.h"
#include "cpu/threads.h"
#include "embedding/cpu/dispatch.h"

namespace py = pybind11;

namespace fused_attn::embedding {
namespace {

// Row numbers, all of them in [0, limit); null if absent.
const int64_t* indices(const TensorView& tensor, int64_t limit) {
  if (!tensor) return nullptr;
  check_device(tensor, DeviceType::kCPU);
  check_dtype(tensor, {DType::kInt64});
  check_contiguous(tensor);
  const int64_t* data = tensor.as<const int64_t>();
  const int64_t count = size(tensor, 0, tensor.ndim);
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] < 0 || data[i] >= limit) {
      throw py::index_error(std::string("`") + tensor.name + "` must be in [0, " +
                            std::to_string(limit) + "), got " + std::to_string(data[i]));
    }
  }
  return data;
}

// What both directions share. `result` is y or dy.
void fill(Problem& problem, const TensorView& result, const TensorView& tokens,
          const TensorView& weight, const TensorView& table, const TensorView& positions,
          const TensorView& rng, double scale, int64_t offset, int64_t padding_idx,
          double dropout_p, int threads) {
  for (const TensorView* tensor : {&result, &tokens, &weight}) check_present(*tensor);
  if (tokens.ndim == 0 || tokens.ndim + 1 != result.ndim) {
    fail_check("tokens", "have one dimension less than the result", std::to_string(tokens.ndim));
  }
  problem.dtype = result.dtype;
  problem.rows = size(result, 0, result.ndim - 1);
  problem.length = tokens.shape[tokens.ndim - 1];
  problem.width = result.shape[result.ndim - 1];
  problem.num_tokens = weight.shape[0];
  check_shape(weight, {kAnySize, problem.width});
  check_shape(table, {kAnySize, problem.width});
  if (size(tokens, 0, tokens.ndim) != problem.rows) {
    fail_check("tokens", "have the shape of the result", "another");
  }
  check_same_shape(positions, tokens);
  if (table) problem.num_positions = table.shape[0];
  if (table && !positions && offset + problem.length > problem.num_positions) {
    fail_check("table", "have a row for each position", std::to_string(problem.num_positions));
  }
  problem.tokens = indices(tokens, problem.num_tokens);
  problem.positions = indices(positions, problem.num_positions);
  problem.weight = rows(weight, 1);
  problem.table = rows(table, 1);
  problem.rng = dropout_rng(rng);
  problem.scale = scale;
  problem.offset = offset;
  problem.padding_idx = padding_idx;
  problem.dropout_p = dropout_p;
  problem.threads = usable_threads(threads);
}

void forward_binding(py::handle tokens, py::handle weight, py::handle table, py::handle positions,
                     py::handle rng, py::handle y_, double scale, int64_t offset,
                     int64_t padding_idx, double dropout_p, int threads) {
  const TensorView y = tensor_view(y_, "y");
  Params params;
  fill(params, y, tensor_view(tokens, "tokens"), tensor_view(weight, "weight"),
       tensor_view(table, "table"), tensor_view(positions, "positions"), tensor_view(rng, "rng"),
       scale, offset, padding_idx, dropout_p, threads);
  params.y = rows(y, 1);
  const py::gil_scoped_release release;
  forward_cpu(params);
}

void backward_binding(py::handle tokens, py::handle weight_, py::handle table_,
                      py::handle positions, py::handle rng, py::handle dy_, py::handle dweight_,
                      py::handle dtable_, double scale, int64_t offset, int64_t padding_idx,
                      double dropout_p, int threads) {
  const TensorView weight = tensor_view(weight_, "weight"), table = tensor_view(table_, "table");
  const TensorView dy = tensor_view(dy_, "dy");
  const TensorView dweight = tensor_view(dweight_, "dweight");
  const TensorView dtable = tensor_view(dtable_, "dtable");
  BackwardParams params;
  fill(params, dy, tensor_view(tokens, "tokens"), weight, table,
       tensor_view(positions, "positions"), tensor_view(rng, "rng"), scale, offset, padding_idx,
       dropout_p, threads);
  check_same_shape(dweight, weight);
  if (dtable) check_present(table);
  check_same_shape(dtable, table);
  params.dy = rows(dy, 1);
  params.dweight = rows(dweight, 1);
  params.dtable = rows(dtable, 1);
  const py::gil_scoped_release release;
  backward_cpu(params);
}

}  // namespace

void bind(py::module_& m) {
  m.def("embedding_forward", &forward_binding);
  m.def("embedding_backward", &backward_binding);
}

}  // namespace fused_attn::embedding
