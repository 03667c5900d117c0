#include "bias_activation/bindings.h"

#include <string>

#include "bias_activation/cpu/dispatch.h"
#include "common/row_bindings.h"
#include "common/tensor.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace fused_attn::bias_activation {

namespace {

// What both directions share. `result` is y or dy.
void fill(Problem& problem, const TensorView& result, const TensorView& x, const TensorView& bias,
          const TensorView& rng, const std::string& activation, bool gated, double dropout_p,
          int threads) {
  check_present(x);
  check_present(result);
  if (x.ndim == 0 || x.ndim != result.ndim) {
    fail_check("x", "have the dimensions of the result", std::to_string(x.ndim));
  }
  problem.dtype = result.dtype;
  problem.rows = size(result, 0, result.ndim - 1);
  problem.width = result.shape[result.ndim - 1];
  problem.gated = gated;
  if (problem.rows != size(x, 0, x.ndim - 1) || problem.width_in() != x.shape[x.ndim - 1]) {
    fail_check("x", "have the shape of the result, twice as wide if gated", "another");
  }
  check_same_shape(bias, x, x.ndim - 1);
  problem.x = rows(x, 1);
  problem.bias = rows(bias, 1);
  problem.rng = dropout_rng(rng);
  problem.activation = activation_of(activation);
  problem.dropout_p = dropout_p;
  problem.threads = usable_threads(threads);
}

void forward_binding(py::handle x, py::handle bias, py::handle rng, py::handle y_,
                     const std::string& activation, bool gated, double dropout_p, int threads) {
  const TensorView y = tensor_view(y_, "y");
  Params params;
  fill(params, y, tensor_view(x, "x"), tensor_view(bias, "bias"), tensor_view(rng, "rng"),
       activation, gated, dropout_p, threads);
  params.y = rows(y, 1);
  const py::gil_scoped_release release;
  forward_cpu(params);
}

void backward_binding(py::handle x_, py::handle bias_, py::handle rng, py::handle dy_,
                      py::handle dx_, py::handle dbias_, const std::string& activation, bool gated,
                      double dropout_p, int threads) {
  const TensorView x = tensor_view(x_, "x"), bias = tensor_view(bias_, "bias");
  const TensorView dy = tensor_view(dy_, "dy"), dx = tensor_view(dx_, "dx");
  const TensorView dbias = tensor_view(dbias_, "dbias");
  BackwardParams params;
  fill(params, dy, x, bias, tensor_view(rng, "rng"), activation, gated, dropout_p, threads);
  check_same_shape(dx, x);
  check_same_shape(dbias, x, x.ndim - 1);
  params.dy = rows(dy, 1);
  params.dx = rows(dx, 1);
  params.dbias = rows(dbias, 1);
  const py::gil_scoped_release release;
  backward_cpu(params);
}

}  // namespace

void bind(py::module_& m) {
  m.def("bias_activation_forward", &forward_binding);
  m.def("bias_activation_backward", &backward_binding);
}

}  // namespace fused_attn::bias_activation
