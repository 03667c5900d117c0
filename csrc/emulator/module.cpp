// `_emulator`: the GPU kernels on the emulated device, for tests. It takes tensors on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/sm90/bindings.h"
#include "common/tensor.h"
#include "emulator/faults.h"
#include "emulator/launch.h"
#include "layer_norm/cuda/bindings.h"

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The CUDA kernels of fused_attn on an emulated device. For tests.";
  m.def("set_seed", &fused_attn::emulator::set_seed, "Schedule of the next launch.");
  m.def("fail_next_launch", &fused_attn::emulator::fail_next_launch, pybind11::arg("code"),
        pybind11::arg("name"), "The next launch fails with this CUDA error.");
  m.def("fault_names", &fused_attn::emulator::fault_names, "Mistakes that the emulator must find.");
  m.def("run_fault", &fused_attn::emulator::run_fault, pybind11::arg("name"), pybind11::arg("seed"),
        "What the emulator reports of a small kernel with this mistake in it.");
  m.def("matrix_products", &fused_attn::emulator::matrix_products,
        "Matrix instructions executed so far.");
  fused_attn::bind_tensor(m);
  fused_attn::attention::bind_attention_cuda(m);
  fused_attn::layer_norm::bind_cuda(m);
}
