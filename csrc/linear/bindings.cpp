#include "linear/bindings.h"

#include <string>

#include "common/row_bindings.h"
#include "common/tensor.h"
#include "cpu/threads.h"
#include "linear/cpu/dispatch.h"

namespace py = pybind11;

namespace fused_attn::linear {
namespace {

// What both directions share. `result` is y or dy.
void fill(Problem& problem, const TensorView& x, const TensorView& weight, const TensorView& result,
          const TensorView& rng, bool gated, double dropout_p, int threads) {
  for (const TensorView* tensor : {&x, &weight, &result}) check_present(*tensor);
  problem.dtype = result.dtype;
  check_dtype(result, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  for (const TensorView* tensor : {&x, &weight}) check_dtype(*tensor, {problem.dtype});
  if (weight.ndim != 2 || x.ndim == 0 || x.ndim != result.ndim) {
    fail_check("x", "have the dimensions of the result, and `weight` two", std::to_string(x.ndim));
  }
  problem.rows = size(x, 0, x.ndim - 1);
  problem.in = x.shape[x.ndim - 1];
  problem.out = result.shape[result.ndim - 1];
  if (problem.rows != size(result, 0, result.ndim - 1)) {
    fail_check("x", "have as many rows as the result", std::to_string(problem.rows));
  }
  check_shape(weight, {gated ? 2 * problem.out : problem.out, problem.in});
  problem.rng = dropout_rng(rng);
  problem.dropout_p = dropout_p;
  problem.threads = usable_threads(threads);
}

Rows dense_rows(const TensorView& tensor, const Problem& problem) {
  check_dtype(tensor, {problem.dtype});
  check_contiguous(tensor);
  return rows(tensor, 1);
}

void forward_binding(py::handle x_, py::handle weight_, py::handle bias_, py::handle residual_,
                     py::handle rng, py::handle y_, const std::string& activation, bool gated,
                     double dropout_p, int threads) {
  const TensorView x = tensor_view(x_, "x"), weight = tensor_view(weight_, "weight");
  const TensorView bias = tensor_view(bias_, "bias"), residual = tensor_view(residual_, "residual");
  const TensorView y = tensor_view(y_, "y");
  Params params;
  fill(params, x, weight, y, tensor_view(rng, "dropout_rng"), gated, dropout_p, threads);
  for (const TensorView* tensor : {&bias, &residual}) check_dtype(*tensor, {params.dtype});
  check_shape(bias, {weight.shape[0]});
  check_same_shape(residual, y);
  params.activates = !activation.empty();
  if (params.activates) params.activation = activation_of(activation);
  params.gated = gated;
  params.x = rows(x, 1);
  params.weight = rows(weight, 1);
  params.bias = rows(bias, 1);
  params.residual = rows(residual, 1);
  params.y = dense_rows(y, params);
  const py::gil_scoped_release release;
  forward_cpu(params);
}

void backward_binding(py::handle x_, py::handle weight_, py::handle rng, py::handle dy_,
                      py::handle dx_, py::handle dweight_, py::handle dbias_, double dropout_p,
                      int threads) {
  const TensorView x = tensor_view(x_, "x"), weight = tensor_view(weight_, "weight");
  const TensorView dy = tensor_view(dy_, "dy"), dx = tensor_view(dx_, "dx");
  const TensorView dweight = tensor_view(dweight_, "dweight"), dbias = tensor_view(dbias_, "dbias");
  BackwardParams params;
  fill(params, x, weight, dy, tensor_view(rng, "dropout_rng"), false, dropout_p, threads);
  check_same_shape(dx, x);
  check_same_shape(dweight, weight);
  check_shape(dbias, {params.out});
  params.x = rows(x, 1);
  params.weight = rows(weight, 1);
  params.dy = rows(dy, 1);
  params.dx = dense_rows(dx, params);
  params.dweight = dense_rows(dweight, params);
  params.dbias = dense_rows(dbias, params);
  const py::gil_scoped_release release;
  backward_cpu(params);
}

}  // namespace

void bind(py::module_& m) {
  m.def("linear_forward", &forward_binding);
  m.def("linear_backward", &backward_binding);
}

}  // namespace fused_attn::linear
