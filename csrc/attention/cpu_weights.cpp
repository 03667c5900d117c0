// Attention weights on the CPU, recomputed from lse for a block of queries at a time; the average
// over heads is summed up before anything is written. Compiled once per instruction-set level.
#include "attention/cpu_kernels.h"
#include "attention/probability.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

struct Scratch {
  HeadBuffers head;
  Buffer sums;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

// sums += probabilities of a tile's scores, for rows that need nothing else; sums[key][query].
template <class E, bool kPlain, bool kMask>
void add_probabilities(const TileMap& map, typename E::Real scale_of_scores,
                       const RowStatistics<typename E::Real>& row, const typename E::Real* scores,
                       typename E::Real* sums) {
  using V = Vec<typename E::Real>;
  const V scale = V::set1(scale_of_scores);
  for (int s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      const V shift = V::load(row.shift + g * kLanes);
      for (int c = segment.begin; c < segment.end; ++c) {
        const int64_t at = c * kBlockQ + g * kLanes;
        V p = probability<E, kPlain>(V::load(scores + at), scale, shift);
        if constexpr (kMask) p = select(lanes_of(map.visible, c, g), p, V::zero());
        (V::load(sums + at) + p).store(sums + at);
      }
    }
  }
}

// Adds the weights of one head, after dropout but without its factor, to sums[key][query].
template <class E>
void add_weights(const WeightsParams& p, const Sequence& sequence, int64_t head, int64_t i,
                 int rows, typename E::Real* sums) {
  using Real = typename E::Real;
  // Masks overwrite whatever score a hidden key has; a bias of -inf does not overwrite NaN.
  HeadScores<E> tile(p, sequence, head, scratch().head, p.bias.data != nullptr);
  tile.select_queries(i, rows);
  const KeyRange keys = tile.visibility.keys(i, i + rows);
  RowStatistics<Real> row;
  bool coarse;
  load_lse(tile.queries(p.lse, 1), rows, row, &coarse);
  if (coarse) refine(tile, keys, row);
  uint64_t keep[kBlockK];
  const bool dropout = tile.dropout.active(), plain = tile.formula.plain;
  tile.for_each_tile(keys, kBlockK, [&] {
    tile.recompute();
    if (!dropout && !row.refined) {
      const bool mask = tile.map.seen == Seen::kSome;
      const auto add =
          mask ? (plain ? add_probabilities<E, true, true> : add_probabilities<E, false, true>)
               : (plain ? add_probabilities<E, true, false> : add_probabilities<E, false, false>);
      return add(tile.map, tile.formula.scale, row, tile.scores, sums + tile.j * kBlockQ);
    }
    probability_tile<E>(tile.map, tile.formula, row, tile.scores);
    if (dropout) tile.dropout.draw(tile.tile(), keep);
    for_each_visible(tile.map, [&](int c, int g) {
      auto weight = Vec<Real>::load(tile.scores + c * kBlockQ + g * kLanes);
      if (dropout) weight = select(lanes_of(keep, c, g), weight, Vec<Real>::zero());
      Real* sum = sums + (tile.j + c) * kBlockQ + g * kLanes;
      (Vec<Real>::load(sum) + weight).store(sum);
    });
  });
}

// Queries [i, i + rows) of one head, or of the average over all heads.
template <class E>
void weights_block(const WeightsParams& p, const Sequence& sequence, int64_t head, int64_t i,
                   int rows) {
  using Real = typename E::Real;
  const int64_t count = sequence.seqlen_k * kBlockQ;
  Real* sums = scratch().sums.get<Real>(count);
  std::memset(sums, 0, sizeof(Real) * static_cast<size_t>(count));
  const int64_t heads = p.average ? p.num_heads : 1;
  for (int64_t h = 0; h < heads; ++h) add_weights<E>(p, sequence, head + h, i, rows, sums);
  alignas(64) Real factor[kBlockQ];
  for (Real& x : factor) x = static_cast<Real>(Dropout(p).factor() / heads);
  write_columns(sums, factor, rows,
                HeadView{p.weights, sequence.batch, head, i, sequence.seqlen_k});
}

}  // namespace

void weights(const WeightsParams& p) {
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    const int64_t heads = p.average ? 1 : p.num_heads;
    const int64_t blocks = ceil_div(p.seqlen_q, kBlockQ);
    if (p.seqlen_k == 0 || p.num_heads == 0) return;
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
