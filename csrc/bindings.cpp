#include "attention/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_level.h"
#include "common/tensor.h"
#include "layer_norm/bindings.h"

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

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

py::dict build_info() {
  return py::dict(py::arg("version") = FUSED_ATTN_VERSION, py::arg("compiler") = kCompiler,
                  py::arg("openmp") = kOpenMP, py::arg("cuda") = false);
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
  fused_attn::bind_tensor(m);
  fused_attn::attention::bind_attention(m);
  fused_attn::layer_norm::bind(m);
}
