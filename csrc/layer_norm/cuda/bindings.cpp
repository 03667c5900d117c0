// layer_norm_forward_cuda and layer_norm_backward_cuda of the compiled module, and of the
// emulator's. They take dense tensors of shape (rows, width), and (width,) for parameters.
#include "layer_norm/cuda/bindings.h"

#include "common/tensor.h"
#include "layer_norm/cuda/launch.h"

namespace py = pybind11;

namespace fused_attn::layer_norm {
namespace {

#if defined(FUSED_ATTN_EMULATED)
constexpr DeviceType kDevice = DeviceType::kCPU;
#else
constexpr DeviceType kDevice = DeviceType::kCUDA;
#endif

// Reads operands of one call, and checks them against the first.
class Reader {
 public:
  explicit Reader(Problem& problem) : problem_(problem) {}

  void first(py::handle object, const char* name) {
    const TensorView tensor = dense(object, name);
    check_present(tensor);
    check_dtype(tensor, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    problem_.dtype = tensor.dtype;
    problem_.rows = tensor.shape[0];
    problem_.width = tensor.shape[1];
  }
  Rows rows(py::handle object, const char* name) const {
    const TensorView tensor = dense(object, name);
    check_dtype(tensor, {problem_.dtype});
    check_shape(tensor, {problem_.rows, problem_.width});
    return {tensor.data, tensor.dtype, {}, {}};
  }
  Rows parameter(py::handle object, const char* name) const {
    const TensorView tensor = dense(object, name);
    check_dtype(tensor, {problem_.dtype, DType::kFloat32});
    check_shape(tensor, {problem_.width});
    return {tensor.data, tensor.dtype, {}, {}};
  }
  Rows gradient(py::handle object, const char* name) const {
    const TensorView tensor = dense(object, name);
    check_dtype(tensor, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    check_shape(tensor, {problem_.width});
    return {tensor.data, tensor.dtype, {}, {}};
  }
  float* statistics(py::handle object, const char* name) const {
    const TensorView tensor = dense(object, name);
    check_dtype(tensor, {DType::kFloat32});
    check_shape(tensor, {problem_.rows});
    return tensor.as<float>();
  }
  void dropout(py::handle rng_, double p) {
    const TensorView rng = dense(rng_, "rng");
    check_dtype(rng, {DType::kInt64});
    check_shape(rng, {2});
    problem_.rng = rng.as<int64_t>();
    problem_.dropout_p = p;
  }

  static TensorView dense(py::handle object, const char* name) {
    const TensorView tensor = tensor_view(object, name);
    check_device(tensor, kDevice, tensor.device_id);
    check_contiguous(tensor);
    return tensor;
  }

 private:
  Problem& problem_;
};

void forward_binding(py::handle x, py::handle residual, py::handle weight, py::handle bias,
                     py::handle rng, py::handle y, py::handle h, py::handle mean, py::handle rstd,
                     double eps, bool rms, double dropout_p, int64_t stream) {
  Params p;
  Reader reader(p);
  reader.first(x, "x");
  p.x = reader.rows(x, "x");
  p.residual = reader.rows(residual, "residual");
  p.weight = reader.parameter(weight, "weight");
  p.bias = reader.parameter(bias, "bias");
  reader.dropout(rng, dropout_p);
  p.y = reader.rows(y, "y");
  p.h = reader.rows(h, "h");
  p.mean = reader.statistics(mean, "mean");
  p.rstd = reader.statistics(rstd, "rstd");
  p.eps = eps;
  p.rms = rms;
  const py::gil_scoped_release release;
  forward_cuda(p, reinterpret_cast<void*>(stream));
}

// `h`: the sum of the forward, or None to make it again from x and residual.
void backward_binding(py::handle x, py::handle residual, py::handle weight, py::handle rng,
                      py::handle h, py::handle mean, py::handle rstd, py::handle dy, py::handle dh,
                      py::handle dx, py::handle dresidual, py::handle dweight, py::handle dbias,
                      py::handle workspace_, bool rms, double dropout_p, int64_t stream) {
  BackwardParams p;
  Reader reader(p);
  reader.first(dy, "dy");
  p.x = reader.rows(x, "x");
  p.residual = reader.rows(residual, "residual");
  p.weight = reader.parameter(weight, "weight");
  reader.dropout(rng, dropout_p);
  p.h = reader.rows(h, "h");
  p.mean = reader.statistics(mean, "mean");
  p.rstd = reader.statistics(rstd, "rstd");
  p.dy = reader.rows(dy, "dy");
  p.dh = reader.rows(dh, "dh");
  p.dx = reader.rows(dx, "dx");
  p.dresidual = reader.rows(dresidual, "dresidual");
  p.dweight = reader.gradient(dweight, "dweight");
  p.dbias = reader.gradient(dbias, "dbias");
  p.rms = rms;
  const TensorView workspace = Reader::dense(workspace_, "workspace");
  check_present(workspace);
  check_dtype(workspace, {DType::kFloat32});
  const int64_t needed = 2 * backward_parts(p) * p.width;
  if (workspace.shape[0] < needed) {
    fail_check("workspace", "hold " + std::to_string(needed) + " numbers",
               std::to_string(workspace.shape[0]));
  }
  const py::gil_scoped_release release;
  backward_cuda(p, workspace.as<float>(), reinterpret_cast<void*>(stream));
}

int64_t parts_binding(int64_t rows) {
  Problem p;
  p.rows = rows;
  return backward_parts(p);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("layer_norm_forward_cuda", &forward_binding);
  m.def("layer_norm_backward_cuda", &backward_binding);
  m.def("layer_norm_parts_cuda", &parts_binding,
        "Partial sums that a backward of so many rows makes of dweight and dbias.");
}

}  // namespace fused_attn::layer_norm
