// The attention functions of the compiled module. They use CPython's vectorcall convention: with
// two dozen arguments, pybind11's own would cost more than the kernel of a small problem.
#include "attention/bindings.h"

#include "attention/arguments.h"
#include "attention/cpu/dispatch.h"
#include "attention/function_arguments.h"

namespace fused_attn::attention {
namespace {

void attention_forward(Arguments& args) {
  Params p;
  read_operands(args, p);
  read_more_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  read_scalars(args, p);
  read_threads(args, p);
  const py::gil_scoped_release release;
  forward_cpu(p);
}

void attention_forward_with_weights(Arguments& args) {
  WeightsParams p;
  read_operands(args, p);
  read_more_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  p.weights = args.view("weights");
  p.average = args.boolean();
  read_scalars(args, p);
  read_threads(args, p);
  const py::gil_scoped_release release;
  forward_with_weights_cpu(p);
}

void attention_backward(Arguments& args) {
  BackwardParams p;
  read_operands(args, p);
  read_more_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  p.dout = args.view("dout");
  p.dlse = args.view("dlse");
  p.dweights = args.view("dweights");
  p.dq = args.view("dq");
  p.dk = args.view("dk");
  p.dv = args.view("dv");
  p.dbias = args.view("dbias");
  read_scalars(args, p);
  read_threads(args, p);
  const py::gil_scoped_release release;
  backward_cpu(p);
}

void attention_forward_with_functions(Arguments& args) {
  Params p;
  PairFunctions functions;
  read_operands(args, p);
  read_more_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  read_functions(args, functions);
  p.functions = &functions;
  read_scalars(args, p);
  read_threads(args, p);
  {
    const py::gil_scoped_release release;
    forward_cpu(p);
  }
  check_inside(functions);
}

void attention_backward_with_functions(Arguments& args) {
  BackwardParams p;
  PairFunctions functions;
  read_operands(args, p);
  read_more_operands(args, p);
  p.out = args.view("out");
  p.lse = args.view("lse");
  p.dout = args.view("dout");
  p.dlse = args.view("dlse");
  p.dq = args.view("dq");
  p.dk = args.view("dk");
  p.dv = args.view("dv");
  read_functions(args, functions);
  p.functions = &functions;
  read_scalars(args, p);
  read_threads(args, p);
  {
    const py::gil_scoped_release release;
    backward_cpu(p);
  }
  check_inside(functions);
}

PyMethodDef kMethods[] = {
    {"attention_forward", method<attention_forward>(), METH_FASTCALL,
     "attention_forward(operands, out, lse, options, threads). Operands: (q, k, v, bias, mask, "
     "key_padding_mask, key_lengths, alibi_slopes, cu_seqlens_q, cu_seqlens_k, rng, sinks (None), "
     "query_documents, key_documents, prefix_lengths). Options: (max_seqlen_q, max_seqlen_k, "
     "causal, window_left, window_right, scale, softcap, dropout_p, chunk)"},
    {"attention_forward_with_weights", method<attention_forward_with_weights>(), METH_FASTCALL,
     "attention_forward_with_weights(operands, out, lse, weights, average, options, threads)"},
    {"attention_backward", method<attention_backward>(), METH_FASTCALL,
     "attention_backward(operands, out, lse, dout, dlse, dweights, dq, dk, dv, dbias, options, "
     "threads)"},
    {"attention_forward_with_functions", method<attention_forward_with_functions>(), METH_FASTCALL,
     "attention_forward_with_functions(operands, out, lse, functions, options, threads). "
     "Functions: "
     "(mask, score, sums, kinds, block_q, block_k, number of leaves, leaf, its gradient, ...)"},
    {"attention_backward_with_functions", method<attention_backward_with_functions>(),
     METH_FASTCALL,
     "attention_backward_with_functions(operands, out, lse, dout, dlse, dq, dk, dv, functions, "
     "options, threads)"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_attention(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), kMethods) != 0) throw py::error_already_set();
  m.def(
      "attention_last_decode_parts", [] { return last_decode_parts; },
      "Into how many parts of the keys this thread's last decoding was split.");
  m.attr("PAIR_OPERATIONS") = pair_operations();
  m.attr("MACHINE_LAYOUT") = machine_layout();
  m.attr("MACHINE_CALLS") = addresses_of_calls();
}

}  // namespace fused_attn::attention
