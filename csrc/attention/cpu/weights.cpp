// The forward with attention weights: a block of queries goes over the keys of one head after the
// other, and the sum of the heads' probabilities is written once. Compiled once per instruction-set
// level.
#include "attention/cpu/decode.h"
#include "attention/cpu/forward_head.h"
#include "attention/cpu/kernels.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

struct Scratch {
  ForwardBuffers head;
  Buffer sums;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

template <class E>
KeptProbabilities<E>& kept_probabilities() {
  static thread_local KeptProbabilities<E> kept;
  return kept;
}

// Queries [i, i + rows) of one head, or of the average over all heads.
template <class E>
void weights_block(const WeightsParams& p, const Sequence& sequence, int64_t head, int64_t i,
                   int rows) {
  using Real = typename E::Real;
  const int64_t count = sequence.seqlen_k * kStrideQ;
  Real* sums = scratch().sums.get<Real>(count);
  std::memset(sums, 0, sizeof(Real) * static_cast<size_t>(count));
  const int64_t heads = p.average ? p.num_heads : 1;
  KeptProbabilities<E>& kept = kept_probabilities<E>();
  for (int64_t h = 0; h < heads; ++h) {
    ForwardHead<E> work(p, sequence, head + h, scratch().head);
    work.block(i, rows, &kept);
    work.add_probabilities(kept, sums);
  }
  alignas(64) Real factor[kBlockQ];
  for (Real& x : factor) x = Real(1) / static_cast<Real>(heads);
  write_columns(sums, factor, rows,
                HeadView{p.weights, sequence.batch, head, i, sequence.seqlen_k});
}

}  // namespace

void forward_with_weights(const WeightsParams& params) {
  // Decoding has kernels of its own for out and lse: more exact, and with the keys of a head shared
  // out over the threads.
  const bool decode = params.seqlen_q <= kDecodeRows;
  if (decode) forward(params);
  WeightsParams p = params;
  if (decode) p.out = p.lse = View4{};
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    const int64_t heads = p.average ? 1 : p.num_heads;
    const int64_t blocks = ceil_div(p.seqlen_q, kBlockQ);
    if (p.num_heads == 0) return;
    parallel_for(useful_threads(p, 4), p.batch * heads * blocks, [&](int64_t task) {
      const Sequence sequence(p, task / blocks / heads);
      const int64_t i = task % blocks * kBlockQ;
      if (i >= sequence.seqlen_q) return;
      const int64_t rows = smaller<int64_t>(sequence.seqlen_q - i, kBlockQ);
      weights_block<E>(p, sequence, task / blocks % heads, i, static_cast<int>(rows));
    });
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
