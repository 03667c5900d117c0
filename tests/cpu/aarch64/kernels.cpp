// The kernels of one level, called through pipes: a call comes from stdin, results go to stdout.
//
//   <function> <number of blocks> <number of arguments>     a line of text
//   <bytes>, then the block's memory                        for each block
//   t <block> <byte offset> <dtype> <ndim> <shape> <strides>   or  n (None)  i <integer>
//   f <number>  s <text>  (empty: -)                        a line for each argument
//
// The arguments are those of the compiled module, in its order; every block goes back. Python's
// end is tests/cpu/aarch64/plugin.py.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "attention/cpu/dispatch.h"
#include "bias_activation/cpu/dispatch.h"
#include "common/merge_dims.h"
#include "cpu/dispatch.h"
#include "embedding/cpu/dispatch.h"
#include "layer_norm/cpu/dispatch.h"
#include "linear/cpu/dispatch.h"

namespace fused_attn {

#define DECLARE(operation)                                              \
  namespace operation {                                                 \
  FUSED_ATTN_DECLARE_KERNEL(FUSED_ATTN_LEVEL, forward, Params)          \
  FUSED_ATTN_DECLARE_KERNEL(FUSED_ATTN_LEVEL, backward, BackwardParams) \
  }
DECLARE(attention)
DECLARE(layer_norm)
DECLARE(bias_activation)
DECLARE(embedding)
DECLARE(linear)
#undef DECLARE
namespace attention {
FUSED_ATTN_DECLARE_KERNEL(FUSED_ATTN_LEVEL, forward_with_weights, WeightsParams)
thread_local int64_t last_decode_parts = 0;
}  // namespace attention

namespace {

struct Argument {
  char kind = 'n';
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t shape[8] = {}, stride[8] = {};
  int64_t integer = 0;
  double number = 0;
  std::string text;
};

struct Call {
  std::string function;
  std::vector<std::vector<char>> blocks;
  std::vector<Argument> arguments;
  size_t next = 0;
  std::vector<std::unique_ptr<char[]>> copies;

  const Argument& take() { return arguments.at(next++); }
  int64_t integer() { return take().integer; }
  double real() {
    const Argument& a = take();
    return a.kind == 'i' ? static_cast<double>(a.integer) : a.number;
  }
  View4 view() { return view_of(take()); }
  static View4 view_of(const Argument& a) {
    View4 view;
    view.data = a.data;
    view.dtype = a.dtype;
    for (int d = 0; d < a.ndim; ++d) view.stride[d] = a.shape[d] == 1 ? 0 : a.stride[d];
    return view;
  }
  template <class T>
  const T* numbers() {
    const Argument& a = take();
    if (a.data == nullptr || a.shape[0] <= 1 || a.stride[0] == 1) return static_cast<T*>(a.data);
    copies.push_back(std::make_unique<char[]>(static_cast<size_t>(a.shape[0]) * sizeof(T)));
    T* copy = reinterpret_cast<T*>(copies.back().get());
    for (int64_t i = 0; i < a.shape[0]; ++i) copy[i] = static_cast<T*>(a.data)[i * a.stride[0]];
    return copy;
  }
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(2);
}

int64_t read_integer() {
  long long number = 0;
  if (std::scanf("%lld", &number) != 1) fail("a number was expected");
  return number;
}

std::string read_word() {
  char word[64];
  if (std::scanf("%63s", word) != 1) return "";
  return word;
}

bool read_call(Call& call) {
  call.function = read_word();
  if (call.function.empty()) return false;
  call.blocks.resize(static_cast<size_t>(read_integer()));
  call.arguments.resize(static_cast<size_t>(read_integer()));
  for (auto& block : call.blocks) {
    block.resize(static_cast<size_t>(read_integer()) + 1);  // never without an address
    std::getchar();
    if (std::fread(block.data(), 1, block.size() - 1, stdin) != block.size() - 1) fail("short");
  }
  for (auto& a : call.arguments) {
    a.kind = read_word()[0];
    if (a.kind == 'i') a.integer = read_integer();
    if (a.kind == 'f') a.number = std::strtod(read_word().c_str(), nullptr);
    if (a.kind == 's') a.text = read_word();
    if (a.kind != 't') continue;
    const size_t block = static_cast<size_t>(read_integer());
    a.data = call.blocks.at(block).data() + read_integer();
    a.dtype = static_cast<DType>(read_integer());
    a.ndim = static_cast<int>(read_integer());
    for (int d = 0; d < a.ndim; ++d) a.shape[d] = read_integer();
    for (int d = 0; d < a.ndim; ++d) a.stride[d] = read_integer();
  }
  return true;
}

Rows rows(const Argument& a, int dims) {
  if (a.data == nullptr) return {};
  const int outer = a.ndim - dims;
  return {a.data, a.dtype, merge_dims(a.shape, a.stride, 0, outer),
          merge_dims(a.shape, a.stride, outer, a.ndim)};
}

int64_t size(const Argument& a, int begin, int end) {
  int64_t size = 1;
  for (int d = begin; d < end; ++d) size *= a.shape[d];
  return size;
}

Activation activation(const std::string& name) {
  const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  fail("an unknown activation");
}

void read_operands(Call& c, attention::Params& p) {
  const Argument &q = c.take(), &k = c.take(), &v = c.take();
  p.dtype = q.dtype;
  p.batch = q.shape[0];
  p.num_heads = q.shape[1];
  p.seqlen_q = q.shape[2];
  p.head_dim = q.shape[3];
  p.num_heads_kv = k.shape[1];
  p.seqlen_k = k.shape[2];
  p.head_dim_v = v.shape[3];
  p.q = Call::view_of(q);
  p.k = Call::view_of(k);
  p.v = Call::view_of(v);
  p.bias = c.view();
  p.mask = c.view();
  const View4 padding = c.view();
  p.key_padding_mask = static_cast<const uint8_t*>(padding.data);
  p.key_padding_stride[0] = padding.stride[0];
  p.key_padding_stride[1] = padding.stride[1];
  p.key_lengths = c.numbers<int64_t>();
  p.alibi_slopes = c.numbers<float>();
  const Argument& cu = c.arguments.at(c.next);
  if (cu.data != nullptr) p.batch = cu.shape[0] - 1;
  p.cu_seqlens_q = c.numbers<int32_t>();
  p.cu_seqlens_k = c.numbers<int32_t>();
  p.rng = c.numbers<int64_t>();
  c.take();  // sinks, which no kernel knows
  p.query_documents = c.view();
  p.key_documents = c.view();
  p.prefix_lengths = c.numbers<int64_t>();
}

void read_options(Call& c, attention::Params& p) {
  const int64_t max_q = c.integer(), max_k = c.integer();
  p.rows_q = p.seqlen_q;
  p.rows_k = p.seqlen_k;
  if (p.cu_seqlens_q != nullptr) p.seqlen_q = max_q, p.seqlen_k = max_k;
  p.causal = static_cast<attention::Causal>(c.integer());
  p.window_left = c.integer();
  p.window_right = c.integer();
  p.scale = c.real();
  p.softcap = c.real();
  p.dropout_p = c.real();
  p.chunk = c.integer();
}

void attention_forward(Call& c) {
  attention::Params p;
  read_operands(c, p);
  p.out = c.view();
  p.lse = c.view();
  read_options(c, p);
  attention::FUSED_ATTN_LEVEL::forward(p);
}

void attention_forward_with_weights(Call& c) {
  attention::WeightsParams p;
  read_operands(c, p);
  for (View4* view : {&p.out, &p.lse, &p.weights}) *view = c.view();
  p.average = c.integer() != 0;
  read_options(c, p);
  attention::FUSED_ATTN_LEVEL::forward_with_weights(p);
}

void attention_backward(Call& c) {
  attention::BackwardParams p;
  read_operands(c, p);
  for (View4* view :
       {&p.out, &p.lse, &p.dout, &p.dlse, &p.dweights, &p.dq, &p.dk, &p.dv, &p.dbias}) {
    *view = c.view();
  }
  read_options(c, p);
  attention::FUSED_ATTN_LEVEL::backward(p);
}

// `options`: where dims, eps, rms and dropout_p begin.
void fill(Call& c, layer_norm::Problem& p, const Argument& like, size_t options) {
  const auto& a = c.arguments;
  const int dims = static_cast<int>(a.at(options).integer);
  p.dtype = like.dtype;
  p.rows = size(like, 0, like.ndim - dims);
  p.width = size(like, like.ndim - dims, like.ndim);
  p.x = rows(a.at(0), dims);
  p.residual = rows(a.at(1), dims);
  p.weight = rows(a.at(2), dims);
  p.bias = rows(a.at(3), dims);
  p.rng = static_cast<const int64_t*>(a.at(4).data);
  p.rms = a.at(options + 2).integer != 0;
  p.dropout_p = a.at(options + 3).number;
}

void layer_norm_forward(Call& c) {
  const auto& a = c.arguments;
  const int dims = static_cast<int>(a.at(9).integer);
  layer_norm::Params p;
  fill(c, p, a.at(5), 9);
  p.eps = a.at(10).number;
  p.y = rows(a.at(5), dims);
  p.h = rows(a.at(6), dims);
  p.mean = a.at(7).data;
  p.rstd = a.at(8).data;
  layer_norm::FUSED_ATTN_LEVEL::forward(p);
}

void layer_norm_backward(Call& c) {
  const auto& a = c.arguments;
  const int dims = static_cast<int>(a.at(14).integer);
  layer_norm::BackwardParams p;
  fill(c, p, a.at(8), 14);
  if (a.at(5).integer != 0) p.h = p.x, p.x = {};
  p.mean = a.at(6).data;
  p.rstd = a.at(7).data;
  size_t i = 8;
  for (Rows* x : {&p.dy, &p.dh, &p.dx, &p.dresidual, &p.dweight, &p.dbias}) {
    *x = rows(a.at(i++), dims);
  }
  layer_norm::FUSED_ATTN_LEVEL::backward(p);
}

void fill(Call& c, bias_activation::Problem& p, const Argument& result, size_t options) {
  const auto& a = c.arguments;
  p.dtype = result.dtype;
  p.rows = size(result, 0, result.ndim - 1);
  p.width = result.shape[result.ndim - 1];
  p.x = rows(a.at(0), 1);
  p.bias = rows(a.at(1), 1);
  p.rng = static_cast<const int64_t*>(a.at(2).data);
  p.activation = activation(a.at(options).text);
  p.gated = a.at(options + 1).integer != 0;
  p.dropout_p = a.at(options + 2).number;
}

void bias_activation_forward(Call& c) {
  bias_activation::Params p;
  fill(c, p, c.arguments.at(3), 4);
  p.y = rows(c.arguments.at(3), 1);
  bias_activation::FUSED_ATTN_LEVEL::forward(p);
}

void bias_activation_backward(Call& c) {
  bias_activation::BackwardParams p;
  fill(c, p, c.arguments.at(3), 6);
  p.dy = rows(c.arguments.at(3), 1);
  p.dx = rows(c.arguments.at(4), 1);
  p.dbias = rows(c.arguments.at(5), 1);
  bias_activation::FUSED_ATTN_LEVEL::backward(p);
}

void fill(Call& c, embedding::Problem& p, const Argument& result, size_t options) {
  const auto& a = c.arguments;
  const Argument &tokens = a.at(0), &weight = a.at(1), &table = a.at(2);
  p.dtype = result.dtype;
  p.rows = size(result, 0, result.ndim - 1);
  p.length = tokens.shape[tokens.ndim - 1];
  p.width = result.shape[result.ndim - 1];
  p.num_tokens = weight.shape[0];
  if (table.data != nullptr) p.num_positions = table.shape[0];
  p.tokens = static_cast<const int64_t*>(tokens.data);
  p.positions = static_cast<const int64_t*>(a.at(3).data);
  p.weight = rows(weight, 1);
  p.table = rows(table, 1);
  p.rng = static_cast<const int64_t*>(a.at(4).data);
  p.scale = a.at(options).number;
  p.offset = a.at(options + 1).integer;
  p.padding_idx = a.at(options + 2).integer;
  p.dropout_p = a.at(options + 3).number;
}

void embedding_forward(Call& c) {
  embedding::Params p;
  fill(c, p, c.arguments.at(5), 6);
  p.y = rows(c.arguments.at(5), 1);
  embedding::FUSED_ATTN_LEVEL::forward(p);
}

void embedding_backward(Call& c) {
  embedding::BackwardParams p;
  fill(c, p, c.arguments.at(5), 8);
  p.dy = rows(c.arguments.at(5), 1);
  p.dweight = rows(c.arguments.at(6), 1);
  p.dtable = rows(c.arguments.at(7), 1);
  embedding::FUSED_ATTN_LEVEL::backward(p);
}

void fill(linear::Problem& p, const Argument& x, const Argument& result, const Argument& rng) {
  p.dtype = result.dtype;
  p.rows = size(x, 0, x.ndim - 1);
  p.in = x.shape[x.ndim - 1];
  p.out = result.shape[result.ndim - 1];
  p.rng = static_cast<const int64_t*>(rng.data);
}

void linear_forward(Call& c) {
  const auto& a = c.arguments;
  linear::Params p;
  fill(p, a.at(0), a.at(5), a.at(4));
  size_t i = 0;
  for (Rows* x : {&p.x, &p.weight, &p.bias, &p.residual}) *x = rows(a.at(i++), 1);
  p.y = rows(a.at(5), 1);
  p.activates = a.at(6).text != "-";
  if (p.activates) p.activation = activation(a.at(6).text);
  p.gated = a.at(7).integer != 0;
  p.dropout_p = a.at(8).number;
  linear::FUSED_ATTN_LEVEL::forward(p);
}

void linear_backward(Call& c) {
  const auto& a = c.arguments;
  linear::BackwardParams p;
  fill(p, a.at(0), a.at(3), a.at(2));
  p.x = rows(a.at(0), 1);
  p.weight = rows(a.at(1), 1);
  size_t i = 3;
  for (Rows* x : {&p.dy, &p.dx, &p.dweight, &p.dbias}) *x = rows(a.at(i++), 1);
  p.dropout_p = a.at(7).number;
  linear::FUSED_ATTN_LEVEL::backward(p);
}

struct Function {
  const char* name;
  void (*run)(Call&);
};
#define FUNCTION(name) {#name, name}
constexpr Function kFunctions[] = {
    FUNCTION(attention_forward),        FUNCTION(attention_forward_with_weights),
    FUNCTION(attention_backward),       FUNCTION(layer_norm_forward),
    FUNCTION(layer_norm_backward),      FUNCTION(bias_activation_forward),
    FUNCTION(bias_activation_backward), FUNCTION(embedding_forward),
    FUNCTION(embedding_backward),       FUNCTION(linear_forward),
    FUNCTION(linear_backward)};

void run(Call& call) {
  for (const Function& function : kFunctions) {
    if (call.function == function.name) return function.run(call);
  }
  fail("an unknown function");
}

}  // namespace
}  // namespace fused_attn

int main() {
  while (true) {
    fused_attn::Call call;
    if (!fused_attn::read_call(call)) return 0;
    fused_attn::run(call);
    for (const auto& block : call.blocks) std::fwrite(block.data(), 1, block.size() - 1, stdout);
    std::fflush(stdout);
  }
}
