// `_emulator`: the GPU kernels on the emulated device, for tests. It takes tensors on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "attention/sm90/bindings.h"
#include "common/tensor.h"
#include "cuda/launch.h"
#include "emulator/faults.h"
#include "emulator/launch.h"
#include "emulator/runtime.h"
#include "layer_norm/cuda/bindings.h"

namespace py = pybind11;

namespace fused_attn::emulator {
namespace {

std::string encoder_refuses(int rank, uint64_t address, const std::vector<uint64_t>& size,
                            const std::vector<uint64_t>& stride, const std::vector<uint32_t>& box,
                            const std::vector<uint32_t>& step, int element_bytes, int interleave,
                            int swizzle) {
  EncoderCall call;
  call.rank = rank;
  call.address = address;
  std::copy_n(size.begin(), std::min<std::size_t>(size.size(), 5), call.size);
  std::copy_n(stride.begin(), std::min<std::size_t>(stride.size(), 4), call.stride);
  std::copy_n(box.begin(), std::min<std::size_t>(box.size(), 5), call.box);
  std::copy_n(step.begin(), std::min<std::size_t>(step.size(), 5), call.step);
  call.element_bytes = element_bytes;
  call.interleave = interleave;
  call.swizzle = swizzle;
  return why_not_encoded(call);
}

void nothing() {}

void launch_nothing(int64_t blocks, int threads, uint32_t shared_bytes) {
  device::launch(&nothing, {"nothing", blocks, threads, shared_bytes, 0}, nullptr);
}

void bind_runtime(py::module_& m) {
  m.def("reset_runtime", &reset_runtime, py::arg("devices") = 1,
        "A runtime of so many devices, which was never called.");
  m.def("runtime_calls", &runtime_calls, "How often each function of the runtime was called.");
  m.def("bound_device", &bound_device, "Device of this thread's context; -1: it has none.");
  m.def("last_error", &last_error, "What cudaPeekAtLastError says to this thread.");
  m.def("fail_next_call", &fail_next_call, py::arg("function"), py::arg("code"), py::arg("name"),
        "The next call of this function of the runtime fails with this error.");
  m.def("set_device", [](int device) { return static_cast<int>(cudaSetDevice(device)); });
  m.def("launch_nothing", &launch_nothing, py::arg("blocks"), py::arg("threads"),
        py::arg("shared_bytes"), "A kernel that does nothing, launched as all are.");
  m.def("encoder_refuses", &encoder_refuses, py::arg("rank") = 5, py::arg("address") = 0,
        py::arg("size"), py::arg("stride"), py::arg("box"), py::arg("step"),
        py::arg("element_bytes") = 2, py::arg("interleave") = 0, py::arg("swizzle") = 3,
        "Why the driver would not encode this map; empty if it would.");
}

}  // namespace
}  // namespace fused_attn::emulator

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The CUDA kernels of fused_attn on an emulated device. For tests.";
  m.def("set_seed", &fused_attn::emulator::set_seed, "Schedule of the next launch.");
  m.def("fault_names", &fused_attn::emulator::fault_names, "Mistakes that the emulator must find.");
  m.def("run_fault", &fused_attn::emulator::run_fault, pybind11::arg("name"), pybind11::arg("seed"),
        "What the emulator reports of a small kernel with this mistake in it.");
  m.def("matrix_products", &fused_attn::emulator::matrix_products,
        "Matrix instructions executed so far.");
  fused_attn::emulator::bind_runtime(m);
  fused_attn::bind_tensor(m);
  fused_attn::attention::bind_attention_cuda(m);
  fused_attn::layer_norm::bind_cuda(m);
}
