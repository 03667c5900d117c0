#include "layer_norm/bindings.h"

#include <utility>

#include "common/row_bindings.h"
#include "common/tensor.h"
#include "cpu/threads.h"
#include "layer_norm/cpu/dispatch.h"

namespace py = pybind11;

namespace fused_attn::layer_norm {
namespace {

// Statistics: one number a row, dense.
void* statistics(const TensorView& tensor, const Problem& problem) {
  if (!tensor) return nullptr;
  check_device(tensor, DeviceType::kCPU);
  check_dtype(tensor, {problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32});
  check_contiguous(tensor);
  const int64_t count = size(tensor, 0, tensor.ndim);
  if (count != problem.rows) {
    fail_check(tensor.name, "have " + std::to_string(problem.rows) + " elements",
               std::to_string(count));
  }
  return tensor.data;
}

// What both directions share. `like` has the shape and `dtype` the dtype of y.
void fill(Problem& problem, const TensorView& like, DType dtype, const TensorView& x,
          const TensorView& residual, const TensorView& weight, const TensorView& bias,
          const TensorView& rng, int dims, bool rms, double dropout_p, int threads) {
  problem.x = rows(x, dims);
  problem.dtype = dtype;
  problem.rows = size(like, 0, like.ndim - dims);
  problem.width = size(like, like.ndim - dims, like.ndim);
  for (const TensorView* tensor : {&x, &residual}) check_same_shape(*tensor, like);
  for (const TensorView* tensor : {&weight, &bias})
    check_same_shape(*tensor, like, like.ndim - dims);
  problem.residual = rows(residual, dims);
  problem.weight = rows(weight, dims);
  problem.bias = rows(bias, dims);
  problem.rng = dropout_rng(rng);
  problem.rms = rms;
  problem.dropout_p = dropout_p;
  problem.threads = usable_threads(threads);
}

void forward_binding(py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_,
                     py::handle rng_, py::handle y_, py::handle h_, py::handle mean_,
                     py::handle rstd_, int dims, double eps, bool rms, double dropout_p,
                     int threads) {
  const TensorView x = tensor_view(x_, "x"), y = tensor_view(y_, "y"), h = tensor_view(h_, "h");
  const TensorView residual = tensor_view(residual_, "residual");
  check_present(x);
  check_present(y);
  Params params;
  fill(params, y, y.dtype, x, residual, tensor_view(weight_, "weight"), tensor_view(bias_, "bias"),
       tensor_view(rng_, "rng"), dims, rms, dropout_p, threads);
  params.eps = eps;
  params.y = rows(y, dims);
  params.h = rows(h, dims);
  check_same_shape(h, y);
  if (h && !residual) fail_check("h", "be None where nothing is added to x", "a tensor");
  if (params.rng != nullptr && !residual) check_present(residual);
  params.mean = statistics(tensor_view(mean_, "mean"), params);
  params.rstd = statistics(tensor_view(rstd_, "rstd"), params);
  const py::gil_scoped_release release;
  forward_cpu(params);
}

void backward_binding(py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_,
                      py::handle rng_, bool summed, py::handle mean_, py::handle rstd_,
                      py::handle dy_, py::handle dh_, py::handle dx_, py::handle dresidual_,
                      py::handle dweight_, py::handle dbias_, int dims, double eps, bool rms,
                      double dropout_p, int threads) {
  (void)eps;  // it is in rstd; the argument keeps both calls alike
  const TensorView x = tensor_view(x_, "x"), dy = tensor_view(dy_, "dy");
  const TensorView dh = tensor_view(dh_, "dh"), dx = tensor_view(dx_, "dx");
  const TensorView dresidual = tensor_view(dresidual_, "dresidual");
  const TensorView dweight = tensor_view(dweight_, "dweight");
  const TensorView dbias = tensor_view(dbias_, "dbias");
  check_present(dy);
  check_present(x);
  BackwardParams params;
  fill(params, dy, dy.dtype, x, tensor_view(residual_, "residual"), tensor_view(weight_, "weight"),
       tensor_view(bias_, "bias"), tensor_view(rng_, "rng"), dims, rms, dropout_p, threads);
  for (const TensorView* tensor : {&dh, &dx, &dresidual}) check_same_shape(*tensor, dy);
  for (const TensorView* tensor : {&dweight, &dbias}) {
    check_same_shape(*tensor, dy, dy.ndim - dims);
  }
  if (summed) params.h = std::exchange(params.x, {});
  params.mean = statistics(tensor_view(mean_, "mean"), params);
  const TensorView rstd = tensor_view(rstd_, "rstd");
  check_present(rstd);
  params.rstd = statistics(rstd, params);
  params.dy = rows(dy, dims);
  params.dh = rows(dh, dims);
  params.dx = rows(dx, dims);
  params.dresidual = rows(dresidual, dims);
  params.dweight = rows(dweight, dims);
  params.dbias = rows(dbias, dims);
  const py::gil_scoped_release release;
  backward_cpu(params);
}

}  // namespace

void bind(py::module_& m) {
  m.def("layer_norm_forward", &forward_binding);
  m.def("layer_norm_backward", &backward_binding);
}

}  // namespace fused_attn::layer_norm
