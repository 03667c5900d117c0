// The scores of one head, tile by tile: what forward, backward and weights have in common.
#pragma once

#include "attention/cpu/gemm.h"
#include "attention/cpu/score.h"
#include "attention/cpu/tile_functions.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// A head of a sequence.
struct HeadOf {
  Sequence sequence;
  int64_t head;
};

// What is prefetched before a head starts: beyond this it would push what the head at work needs
// out of the second cache.
constexpr int64_t kPrefetchBytes = int64_t{512} << 10;

struct HeadBuffers {
  Buffer keep, k, q_rows, q, scores, bias;
  FunctionBuffers functions;
};

// Keys are prepared once per head, queries once per block; then any tile can be asked for.
template <class E>
class HeadScores {
 public:
  using Real = typename E::Real;
  using Unit = typename E::Unit;

  HeadScores(const Params& params, const Sequence& sequence_of, int64_t head_index,
             HeadBuffers& buffers)
      : p(params),
        sequence(sequence_of),
        head(head_index),
        visibility(params, sequence_of, head_index),
        formula(params),
        dropout(params),
        functions(params, sequence_of, head_index, buffers.functions),
        keep_keys(functions.hides() ? functions.keys_to_keep(visibility, buffers.keep)
                                    : keys_to_keep<Real>(params, sequence_of, head_index,
                                                         visibility, buffers.keep)),
        buffers_(buffers),
        units_(units<E>(params.head_dim)) {
    constexpr int64_t kTile = int64_t{kBlockK} * kStrideQ;
    k = prepare_rows<E>(key_view(p, p.k, sequence, head, p.head_dim), visibility.keys(), keep_keys,
                        buffers.k);
    q = buffers.q.get<Unit>(units_ * kStrideQ);
    scores = buffers.scores.get<Real>(kTile);
    if (p.bias.data != nullptr) bias_ = buffers.bias.get<Real>(kTile);
  }

  // Prefetches what the next head needs while this one computes its blocks.
  void prefetch_head(const HeadOf& next_head, const ByteRows (&rows)[HeadPrefetcher::kSets],
                     int64_t blocks) {
    next = &next_head;
    int64_t lines = 0;
    for (const ByteRows& x : rows) lines += x.lines();
    if (lines * ByteRows::kLine <= kPrefetchBytes) prefetcher.start_head(rows, blocks);
  }
  ByteRows keys_of(const HeadOf& x, const View4& view, int64_t columns) const {
    return byte_rows<Real>(key_view(p, view, x.sequence, x.head, columns), 0, x.sequence.seqlen_k);
  }
  ByteRows queries_of(const HeadOf& x, const View4& view, int64_t columns) const {
    return byte_rows<Real>(query_view(p, view, x.sequence, x.head, columns), 0,
                           x.sequence.seqlen_q);
  }

  // Prefetches, while the block of queries from `first` on is computed in products of so many
  // tiles, where its result goes and the queries that follow, before `end` or of the next head.
  void prefetch_block(const View4& result, int64_t columns, int64_t first, int64_t end,
                      int64_t tiles) {
    if (next == nullptr) return;
    const HeadOf self{sequence, head};
    const int64_t middle = smaller(first + kBlockQ, end);
    const ByteRows to = queries_of(self, result, columns).part(first, middle);
    const ByteRows q = middle < end
                           ? queries_of(self, p.q, p.head_dim).part(middle, end)
                           : queries_of(*next, p.q, p.head_dim).part(0, next->sequence.seqlen_q);
    prefetcher.start_block(to, q.part(0, kBlockQ), tiles);
  }

  // Selects the queries [first, first + count).
  void select_queries(int64_t first, int count) {
    i = first;
    rows = count;
    groups = static_cast<int>(ceil_div(count, kLanes));
    const UnitRows<E> from =
        prepare_rows<E>(queries(p.q, p.head_dim), {0, rows}, nullptr, buffers_.q_rows);
    pack_columns<E>(from, rows, units_, q);
    functions.select_queries(i, rows);
  }

  // Selects the keys [first, first + count); false if none of the queries sees any of them.
  bool select_keys(int64_t first, int64_t count) {
    j = first;
    visibility.tile(i, rows, j, static_cast<int>(count), map);
    if (functions.hides() && map.seen != Seen::kNone) functions.hide(i, rows, j, map);
    return map.seen != Seen::kNone;
  }

  // Calls call() for each visible tile of `width` keys of the range.
  template <class Call>
  void for_each_tile(KeyRange range, int64_t width, const Call& call) {
    for (int64_t first = range.begin / E::kPair * E::kPair; first < range.end; first += width) {
      if (select_keys(first, smaller(range.end - first, width))) call();
    }
  }

  // scores = K Q^T over the visible part of the tile.
  template <class Epilogue>
  void multiply_queries(const Epilogue& epilogue) {
    for (int s = 0; s < map.num_segments; ++s) {
      const Segment& segment = map.segments[s];
      multiply<E, Form::kRows>(
          {k.row(j + segment.begin), k.stride, q, kStrideQ, scores + segment.begin * kStrideQ,
           kStrideQ, segment.end - segment.begin, units_, segment.group_begin, segment.group_end},
          epilogue);
    }
  }

  // Prefetches the tile's bias during the product that comes before it is read.
  void prefetch_bias() {
    with_bias_dtype<Real>(p.bias.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      const int64_t stride = p.bias.stride[2];
      if (stride == 0 || p.bias.stride[3] != 1) return;  // little memory, or lines of one number
      const T* corner = at<const T>(p.bias, sequence.batch, head, i, j);
      prefetcher.start_tile(byte_rows(corner, stride, map.keys, rows),
                            product_tiles<Real>(rows, map.keys));
    });
  }

  // The tile's scores as apply_formula leaves them; raises `largest` to the largest of each query.
  void compute(Real* largest) {
    if (formula.plain && map.seen == Seen::kAll) {
      multiply_queries(then_prefetch(OverwriteAndMax<Real>{largest}, prefetcher));
    } else {
      if (p.bias.data != nullptr) prefetch_bias();
      multiply_queries(then_prefetch(Overwrite{}, prefetcher));
      if (formula.changed) functions.change(tile(), scores, raw, slope);
      apply_formula<Real>(tile(), formula, scores, bias_, slope, largest);
    }
  }

  // The same for those who know the largest already, and who mask what they make of the scores:
  // plain tiles keep q . k where hidden.
  void recompute() {
    if (formula.plain) return multiply_queries(then_prefetch(Overwrite{}, prefetcher));
    alignas(64) Real unused[kBlockQ] = {};
    compute(unused);
  }

  ScoreTile tile() const { return {p, sequence, head, i, rows, j, map}; }
  // The selected queries' rows in a tensor shaped like q or out.
  HeadView queries(const View4& view, int64_t columns) const {
    HeadView x = query_view(p, view, sequence, head, columns);
    x.first += i;
    return x;
  }

  const Params& p;
  const Sequence sequence;
  const int64_t head;
  const Visibility visibility;
  const ScoreFormula<Real> formula;
  const Dropout dropout;
  TileFunctions<Real> functions;
  const uint8_t* const keep_keys;  // see keys_to_keep
  UnitRows<E> k;
  Unit* q;                // [unit][query]
  Real* scores;           // [key][query]
  Real* slope = nullptr;  // where to keep the derivative of the softcap or function, [key][query]
  Real* raw = nullptr;    // where to keep q . k that a function changes, [key][query]

  HeadPrefetcher prefetcher;     // steps between the tiles of products
  const HeadOf* next = nullptr;  // the head that probably follows

  int64_t i = 0;
  int rows = 0;
  int groups = 0;
  int64_t j = 0;
  TileMap map;

 private:
  const ProductRegisters registers_{};
  HeadBuffers& buffers_;
  const int64_t units_;  // of head_dim
  Real* bias_ = nullptr;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
