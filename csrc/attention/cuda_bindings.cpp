// attention_forward_cuda of the compiled module, and of the emulator's.
#include "attention/cuda_bindings.h"

#include "attention/arguments.h"
#include "attention/cuda.h"

namespace fused_attn::attention {
namespace {

#if defined(FUSED_ATTN_EMULATED)
constexpr DeviceType kDevice = DeviceType::kCPU;
#else
constexpr DeviceType kDevice = DeviceType::kCUDA;
#endif

void attention_forward_cuda(Arguments& args) {
  Params p;
  args.expect_device(kDevice);
  read_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  read_scalars(args, p);
  void* stream = reinterpret_cast<void*>(args.integer());
  args.finish();
  const py::gil_scoped_release release;
  forward_cuda(p, stream);
}

PyMethodDef kMethods[] = {
    {"attention_forward_cuda", method<attention_forward_cuda>(), METH_FASTCALL,
     "attention_forward_cuda(<operands of attention_forward>, out, lse, max_seqlen_q, "
     "max_seqlen_k, causal, window_left, window_right, scale, softcap, dropout_p, stream)"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_attention_cuda(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
}

}  // namespace fused_attn::attention
