// attention_forward_cuda and attention_backward_cuda of the compiled module, and of the emulator's.
#include "attention/sm90/bindings.h"

#include "attention/arguments.h"
#include "attention/sm90/launch.h"
#include "cuda/map_cache.h"

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

void attention_backward_cuda(Arguments& args) {
  BackwardParams p;
  args.expect_device(kDevice);
  read_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  p.dout = args.view("dout");
  p.dlse = args.view("dlse");
  p.dq = args.view("dq");
  p.dk = args.view("dk");
  p.dv = args.view("dv");
  p.dbias = args.view("dbias");
  const TensorView workspace = args.tensor("workspace");
  read_scalars(args, p);
  BackwardWay way;
  way.add_up_dq = args.integer() != 0;
  way.first_head = static_cast<int>(args.integer());
  way.head_count = static_cast<int>(args.integer());
  void* stream = reinterpret_cast<void*>(args.integer());
  args.finish();
  check_present(workspace);
  check_dtype(workspace, {DType::kFloat32});
  check_contiguous(workspace);
  const int64_t numbers = backward_workspace(p, way.add_up_dq);
  if (workspace.shape[0] < numbers) {
    fail_check("workspace", "hold " + std::to_string(numbers) + " numbers",
               std::to_string(workspace.shape[0]));
  }
  const py::gil_scoped_release release;
  backward_cuda(p, way, workspace.as<float>(), stream);
}

PyMethodDef kMethods[] = {
    {"attention_forward_cuda", method<attention_forward_cuda>(), METH_FASTCALL,
     "attention_forward_cuda(operands, out, lse, max_seqlen_q, "
     "max_seqlen_k, causal, window_left, window_right, scale, softcap, dropout_p, stream)"},
    {"attention_backward_cuda", method<attention_backward_cuda>(), METH_FASTCALL,
     "attention_backward_cuda(operands, out, lse, dout, dlse, dq, dk, dv, "
     "dbias, workspace, max_seqlen_q, max_seqlen_k, causal, window_left, window_right, scale, "
     "softcap, dropout_p, add_up_dq, first_head, head_count, stream)"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_attention_cuda(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
  m.def("encoded_tensor_maps", &device::encoded_tensor_maps,
        "How many tensor maps the calls of this process have encoded: equal ones are kept.");
}

}  // namespace fused_attn::attention
