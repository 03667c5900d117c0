// Reads functions of pairs from the arguments of the compiled module.
#pragma once

#include "attention/arguments.h"
#include "attention/functions.h"
#include "attention/machine_calls.h"

namespace fused_attn::attention {

// A program is a contiguous (n, 8) tensor of int64, of which the first row is a header; or None.
inline PairProgram read_program(Arguments& args, const char* name) {
  const TensorView tensor = args.tensor(name);
  PairProgram program;
  if (!tensor) return program;
  check_dtype(tensor, {DType::kInt64});
  check_contiguous(tensor);
  check_shape(tensor, {kAnySize, 8});
  const int64_t* header = tensor.as<int64_t>();
  program.instructions = reinterpret_cast<const PairInstruction*>(header + 8);
  program.count = tensor.shape[0] - 1;
  program.per_block = header[0];
  program.per_tile = header[1];
  program.reals = header[2];
  program.ints = header[3];
  program.result = header[4];
  program.slope = header[5];
  program.code = reinterpret_cast<MachineCode>(static_cast<uintptr_t>(header[6]));
  return program;
}

// A vector (batch, head, place), or a table; a table's gradient has batch and head before it.
inline PairLeaf read_leaf(Arguments& args) {
  const TensorView leaf = args.tensor("leaf"), gradient = args.tensor("gradient of a leaf");
  check_present(leaf);
  PairLeaf read;
  read.view = view4(leaf);
  read.dims = leaf.ndim;
  for (int d = 0; d < leaf.ndim; ++d) read.size[d] = leaf.shape[d];
  if (!gradient) return read;
  if (gradient.ndim == leaf.ndim) {
    read.gradient = view4(gradient);
    return read;
  }
  read.gradient_by_head = true;
  read.gradient.data = gradient.data;
  read.gradient.dtype = gradient.dtype;
  const auto stride = [&](int d) { return gradient.shape[d] > 1 ? gradient.stride[d] : 0; };
  read.gradient_batch = stride(0);
  read.gradient_head = stride(1);
  for (int d = 0; d < leaf.ndim; ++d) read.gradient.stride[d] = stride(d + 2);
  return read;
}

// (mask, score, sums, kinds, block_q, block_k, number of leaves, leaf, its gradient, ...)
inline void read_functions(Arguments& args, PairFunctions& functions) {
  functions.mask = read_program(args, "mask");
  functions.score = read_program(args, "score");
  functions.sums = read_program(args, "sums");
  functions.kinds = args.view("kinds");
  functions.block_q = args.integer();
  functions.block_k = args.integer();
  const int64_t leaves = args.integer();
  for (int64_t n = 0; n < leaves; ++n) functions.leaves.push_back(read_leaf(args));
}

inline void check_inside(const PairFunctions& functions) {
  if (functions.outside) throw py::index_error("an index is out of bounds for a captured tensor");
}

// Names of operations in the order of their numbers.
inline py::tuple pair_operations() {
  py::list names;
#define FUSED_ATTN_NAME(name) names.append(#name);
  FUSED_ATTN_PAIR_OPERATIONS(FUSED_ATTN_NAME)
#undef FUSED_ATTN_NAME
  return py::tuple(names);
}

// Addresses of what machine code may call, by name: for float32, for float64.
inline py::dict addresses_of_calls() {
  py::dict found;
  for (const MachineCall& call : machine_calls()) {
    found[call.name] = py::make_tuple(call.single, call.wide);
  }
  return found;
}

// Names and sizes in words, in order, of what machine code is given.
inline py::dict machine_layout() {
  py::list strip, leaf;
#define FUSED_ATTN_FIELD(type, name) strip.append(py::make_tuple(#name, 1));
  FUSED_ATTN_STRIP_FIELDS(FUSED_ATTN_FIELD)
#undef FUSED_ATTN_FIELD
#define FUSED_ATTN_FIELD(type, name, count) leaf.append(py::make_tuple(#name, count));
  FUSED_ATTN_LEAF_FIELDS(FUSED_ATTN_FIELD)
#undef FUSED_ATTN_FIELD
  return py::dict(py::arg("strip") = strip, py::arg("leaf") = leaf);
}

}  // namespace fused_attn::attention
