// Calls of the CPU kernels with several threads, and from several threads at once, for
// ThreadSanitizer to watch. With the word `planted` all heads write one gradient of q: the race
// that it must find.
#include <cstdio>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "attention/cpu/dispatch.h"
#include "bias_activation/cpu/dispatch.h"
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

constexpr int kThreads = 3;

// Memory of one call, filled with small numbers.
class Memory {
 public:
  float* floats(int64_t count) {
    blocks_.emplace_back(static_cast<size_t>(count));
    uint32_t state = 1;
    for (float& x : blocks_.back()) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
    }
    return blocks_.back().data();
  }

  View4 view(int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    return {floats(batch * heads * rows * columns),
            DType::kFloat32,
            {heads * rows * columns, rows * columns, columns, 1}};
  }

  Rows rows(int64_t count, int64_t width) {
    Rows rows;
    rows.data = floats(count * width);
    rows.outer = {1, {count}, {width}};
    rows.inner = {1, {width}, {1}};
    return rows;
  }

  Rows row(int64_t width) {
    Rows row = rows(1, width);
    row.outer = {};
    return row;
  }

 private:
  std::deque<std::vector<float>> blocks_;
};

struct Sizes {
  int64_t batch, heads, heads_kv, seqlen_q, seqlen_k;
};
constexpr int64_t kHeadDim = 24;

void fill(Memory& memory, const Sizes& s, attention::Params& p) {
  p.batch = s.batch;
  p.num_heads = s.heads;
  p.num_heads_kv = s.heads_kv;
  p.seqlen_q = p.rows_q = s.seqlen_q;
  p.seqlen_k = p.rows_k = s.seqlen_k;
  p.head_dim = p.head_dim_v = kHeadDim;
  p.q = memory.view(s.batch, s.heads, s.seqlen_q, kHeadDim);
  p.k = memory.view(s.batch, s.heads_kv, s.seqlen_k, kHeadDim);
  p.v = memory.view(s.batch, s.heads_kv, s.seqlen_k, kHeadDim);
  p.out = memory.view(s.batch, s.heads, s.seqlen_q, kHeadDim);
  p.lse = {memory.floats(s.batch * s.heads * s.seqlen_q),
           DType::kFloat32,
           {s.heads * s.seqlen_q, s.seqlen_q, 1, 0}};
  p.scale = 0.2;
  p.threads = kThreads;
}

// A bias that is one for all of the dimensions that `one` names, of "bhqk".
View4 shared(Memory& memory, const Sizes& s, const char* one) {
  const int64_t sizes[] = {s.batch, s.heads, s.seqlen_q, s.seqlen_k};
  int64_t own[4], count = 1;
  for (int d = 0; d < 4; ++d) own[d] = std::strchr(one, "bhqk"[d]) != nullptr ? 1 : sizes[d];
  View4 view;
  for (int d = 3; d >= 0; --d) {
    view.stride[d] = own[d] == 1 ? 0 : count;
    count *= own[d];
  }
  view.data = memory.floats(count);
  return view;
}

// Forward and backward; `one`: dimensions over which a bias is broadcast; null: no bias.
void attend(const Sizes& s, const char* one, attention::Causal causal, bool planted = false) {
  Memory memory;
  attention::BackwardParams p;
  fill(memory, s, p);
  p.causal = causal;
  if (one != nullptr) {
    p.bias = shared(memory, s, one);
    p.dbias = shared(memory, s, one);
  }
  attention::FUSED_ATTN_LEVEL::forward(p);
  p.dout = memory.view(s.batch, s.heads, s.seqlen_q, kHeadDim);
  p.dq = memory.view(s.batch, s.heads, s.seqlen_q, kHeadDim);
  p.dk = memory.view(s.batch, s.heads_kv, s.seqlen_k, kHeadDim);
  p.dv = memory.view(s.batch, s.heads_kv, s.seqlen_k, kHeadDim);
  if (planted) p.dq.stride[1] = 0;
  attention::FUSED_ATTN_LEVEL::backward(p);
}

void weights(const Sizes& s, bool average) {
  Memory memory;
  attention::WeightsParams p;
  fill(memory, s, p);
  p.average = average;
  p.weights = memory.view(s.batch, average ? 1 : s.heads, s.seqlen_q, s.seqlen_k);
  attention::FUSED_ATTN_LEVEL::forward_with_weights(p);
}

void norm(int64_t rows, int64_t width, bool rms) {
  Memory memory;
  const Rows x = memory.rows(rows, width), weight = memory.row(width), y = memory.rows(rows, width);
  float *mean = memory.floats(rows), *rstd = memory.floats(rows);
  layer_norm::Params p;
  p.rows = rows;
  p.width = width;
  p.x = x;
  p.weight = weight;
  p.rms = rms;
  p.eps = 1e-5;
  p.threads = kThreads;
  p.y = y;
  p.mean = rms ? nullptr : mean;
  p.rstd = rstd;
  layer_norm::FUSED_ATTN_LEVEL::forward(p);
  layer_norm::BackwardParams b;
  static_cast<layer_norm::Problem&>(b) = p;
  b.mean = p.mean;
  b.rstd = rstd;
  b.dy = memory.rows(rows, width);
  b.dx = memory.rows(rows, width);
  b.dweight = memory.row(width);
  b.dbias = memory.row(width);
  layer_norm::FUSED_ATTN_LEVEL::backward(b);
}

void activation(int64_t rows, int64_t width, bool gated) {
  Memory memory;
  const int64_t width_in = gated ? 2 * width : width;
  const int64_t rng[] = {1234, 5};
  bias_activation::Params p;
  p.rows = rows;
  p.width = width;
  p.gated = gated;
  p.activation = Activation::kSilu;
  p.rng = rng;
  p.dropout_p = 0.1;
  p.threads = kThreads;
  p.x = memory.rows(rows, width_in);
  p.bias = memory.row(width_in);
  p.y = memory.rows(rows, width);
  bias_activation::FUSED_ATTN_LEVEL::forward(p);
  bias_activation::BackwardParams b;
  static_cast<bias_activation::Problem&>(b) = p;
  b.dy = memory.rows(rows, width);
  b.dx = memory.rows(rows, width_in);
  b.dbias = memory.row(width_in);
  bias_activation::FUSED_ATTN_LEVEL::backward(b);
}

void embed(int64_t rows, int64_t width) {
  Memory memory;
  constexpr int64_t kTokens = 300, kLength = 40;
  std::vector<int64_t> tokens(static_cast<size_t>(rows));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i * i % kTokens);
  embedding::Params p;
  p.rows = rows;
  p.length = kLength;
  p.width = width;
  p.num_tokens = kTokens;
  p.num_positions = kLength;
  p.tokens = tokens.data();
  p.weight = memory.rows(kTokens, width);
  p.table = memory.rows(kLength, width);
  p.threads = kThreads;
  p.y = memory.rows(rows, width);
  embedding::FUSED_ATTN_LEVEL::forward(p);
  embedding::BackwardParams b;
  static_cast<embedding::Problem&>(b) = p;
  b.dy = memory.rows(rows, width);
  b.dweight = memory.rows(kTokens, width);
  b.dtable = memory.rows(kLength, width);
  embedding::FUSED_ATTN_LEVEL::backward(b);
}

void product(int64_t rows, int64_t in, int64_t out) {
  Memory memory;
  linear::Params p;
  p.rows = rows;
  p.in = in;
  p.out = out;
  p.threads = kThreads;
  p.x = memory.rows(rows, in);
  p.weight = memory.rows(out, in);
  p.bias = memory.row(out);
  p.y = memory.rows(rows, out);
  linear::FUSED_ATTN_LEVEL::forward(p);
  linear::BackwardParams b;
  static_cast<linear::Problem&>(b) = p;
  b.x = p.x;
  b.weight = p.weight;
  b.dy = memory.rows(rows, out);
  b.dx = memory.rows(rows, in);
  b.dweight = memory.rows(out, in);
  b.dbias = memory.row(out);
  linear::FUSED_ATTN_LEVEL::backward(b);
}

void all() {
  const auto none = attention::Causal::kNone, lower = attention::Causal::kLowerRight;
  for (const char* one : {"bh", "bhq", "bhk", "b", "h", "bhqk"}) {
    attend({2, 2, 2, 70, 600}, one, none);
  }
  attend({1, 1, 1, 130, 700}, nullptr, none);   // one head, in parts
  attend({1, 4, 2, 100, 300}, nullptr, lower);  // heads that share keys
  attend({1, 2, 1, 1, 2100}, nullptr, lower);   // decoding by parts of the keys
  for (const bool yes : {false, true}) {
    weights({1, 4, 4, 70, 140}, yes);
    norm(300, 200, yes);
    activation(300, 130, yes);
  }
  embed(500, 100);
  product(70, 200, 150);
  product(2, 300, 400);
}

}  // namespace
}  // namespace fused_attn

int main(int count, char** words) {
  if (count > 1 && std::strcmp(words[1], "planted") == 0) {
    fused_attn::attend({1, 3, 3, 70, 140}, nullptr, fused_attn::attention::Causal::kNone, true);
    return 0;
  }
  fused_attn::all();
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back(fused_attn::all);
  for (std::thread& caller : callers) caller.join();
  std::printf("every kernel ran\n");
}
