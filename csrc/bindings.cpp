#include "attention/bindings.h"
#ifdef FUSED_ATTN_WITH_CUDA
#include "cuda/launch.h"
#include "layer_norm/cuda/bindings.h"
#endif
#ifdef FUSED_ATTN_WITH_HOPPER
#include "attention/sm90/bindings.h"
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bias_activation/bindings.h"
#include "common/call_key.h"
#include "common/tensor.h"
#include "cpu/level.h"
#include "cpu/peak.h"
#include "embedding/bindings.h"
#include "layer_norm/bindings.h"
#include "linear/bindings.h"

namespace py = pybind11;

namespace fused_attn {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef FUSED_ATTN_WITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

py::dict build_info() {
  return py::dict(py::arg("version") = FUSED_ATTN_VERSION, py::arg("compiler") = kCompiler,
                  py::arg("openmp") = kOpenMP, py::arg("cuda") = kCuda,
                  py::arg("cuda_archs") = FUSED_ATTN_CUDA_ARCHS,
                  py::arg("cuda_missing") = FUSED_ATTN_CUDA_MISSING);
}

double multiply_adds_of(const std::string& dtype, int64_t repeats) {
  if (dtype == "bfloat16") return multiply_adds(DType::kBFloat16, repeats);
  return multiply_adds(dtype == "float64" ? DType::kFloat64 : DType::kFloat32, repeats);
}

}  // namespace
}  // namespace fused_attn

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fused_attn. Private: use the functions of the package.";
  m.def("build_info", &fused_attn::build_info, "How this module was built, as a dict.");
  m.def("cpu_level", &fused_attn::current_level_name,
        "Instruction-set level that the CPU kernels run at: the best of this machine, or the one "
        "that the environment variable FUSED_ATTN_CPU names.");
  m.def("available_cpu_levels", &fused_attn::available_levels,
        "Levels that this machine and this build can run, lowest first.");
  m.def("cpu_level_left_out", &fused_attn::level_left_out,
        "The best level of this machine where this build was made for a lower one, else ''.");
  m.def("cpu_multiplies_tiles", &fused_attn::multiplies_tiles,
        "Do the kernels of bfloat16 use the processor's instructions for tiles?");
  m.def("cpu_vendor", &fused_attn::cpu_vendor, "Who made this processor: 'amd', 'intel' or ''.");
  m.def("multiply_adds", &fused_attn::multiply_adds_of, py::arg("dtype"), py::arg("repeats"),
        "Multiply-adds in registers, in the arithmetic of a dtype ('float32', 'bfloat16', "
        "'float64'); returns the floating-point operations done. The ceiling of benchmarks.");
  fused_attn::bind_tensor(m);
  fused_attn::bind_call_key(m);
  fused_attn::attention::bind_attention(m);
  fused_attn::layer_norm::bind(m);
  fused_attn::bias_activation::bind(m);
  fused_attn::embedding::bind(m);
  fused_attn::linear::bind(m);
#ifdef FUSED_ATTN_WITH_CUDA
  m.def("cuda_versions", &fused_attn::device::cuda_versions,
        "CUDA versions of the runtime in here and of the driver, as CUDA counts: 13010 is 13.1.");
  fused_attn::layer_norm::bind_cuda(m);
#endif
#ifdef FUSED_ATTN_WITH_HOPPER
  fused_attn::attention::bind_attention_cuda(m);
#endif
}
