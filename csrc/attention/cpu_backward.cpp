// Backward attention on the CPU. Chunks of keys, whose dK and dV stay in the cache, are the outer
// loop; blocks of queries the inner one. For a tile, with P recomputed from lse:
//
//   dV += P^T dO    dP = dO V^T    dS = P * (dP - delta)    dK += dS^T Q    dQ += dS K
//
// delta = rowsum(dO * O) - dlse + rowsum(weights * dweights). Compiled once per instruction set.
#include "attention/cpu_kernels.h"
#include "attention/gradient.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

constexpr int64_t kChunk = 512;     // keys whose float32 dK and dV fit the second-level cache
constexpr int64_t kTileKeys = 128;  // keys of a tile

struct Scratch {
  HeadBuffers head;
  Buffer v, k_pairs, k_rows, q_lanes, q_rows, dout, dout_rows, dout_lanes, dp, p, ds, ds_pairs,
      ds_full, dweights, slope, dq, dk, dv, rows;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

FUSED_ATTN_INLINE int64_t lanes_up(int64_t columns) {
  return ceil_div(columns, kLanes) * kLanes;
}

// Sums of the gradients of the keys and values of one kv head, [key][column padded to lanes]. Heads
// that share keys add up over all of them; otherwise the buffer holds one chunk.
template <class Real>
struct KeyGradients {
  Real* dk;
  Real* dv;
  int64_t stride_k;
  int64_t stride_v;
  int64_t first;  // key of row 0
};

template <class E>
class BackwardHead {
  using Real = typename E::Real;
  using Unit = typename E::Unit;
  using Element = typename E::Element;

 public:
  BackwardHead(const BackwardParams& p, const Sequence& sequence, int64_t head)
      : p_(p), tile_(p, sequence, head, scratch().head, true), units_v_(units<E>(p.head_dim_v)) {
    Scratch& s = scratch();
    constexpr int64_t kTile = kTileKeys * kBlockQ;
    const KeyRange range = tile_.visibility.keys();
    v_ = prepare_rows<E>(key_view(p, p.v, sequence, head, p.head_dim_v), range, tile_.keep_keys,
                         s.v);
    k_pairs_ = E::kPair == 1 ? tile_.k
                             : prepare_pairs<E>(key_view(p, p.k, sequence, head, p.head_dim), range,
                                                tile_.keep_keys, p.head_dim, s.k_pairs, s.k_rows);
    if (p.softcap > 0) tile_.slope = s.slope.template get<Real>(kTile);
    dout_ = s.dout.template get<Unit>(units_v_ * kBlockQ);
    dp_ = s.dp.template get<Real>(kTile);
    if (E::kPair > 1) {
      p_tile_ = s.p.template get<Element>(kTile);
      ds_tile_ = s.ds.template get<Element>(kTile);
      ds_pairs_ = s.ds_pairs.template get<Unit>(kTile / E::kPair);
    }
    if (p.dbias.data != nullptr) ds_full_ = s.ds_full.template get<Real>(kTile);
    if (p.dweights.data != nullptr) dweights_ = s.dweights.template get<Real>(kTile);
    const int64_t blocks = ceil_div(sequence.seqlen_q, kBlockQ);
    one_chunk_ = range.end - range.begin <= kChunk;
    dq_ = s.dq.template get<Real>((one_chunk_ ? 1 : blocks) * p.head_dim * kBlockQ);
    rows_ = s.rows.template get<RowStatistics<Real>>(blocks);
    for (int64_t b = 0; b < blocks; ++b) prepare_rows_of(b);
  }

  // All blocks of queries against the keys of one chunk.
  void chunk(KeyRange keys, bool first, bool last, const KeyGradients<Real>& sums) {
    sums_ = &sums;
    const int64_t blocks = ceil_div(tile_.sequence.seqlen_q, kBlockQ);
    for (int64_t b = 0; b < blocks; ++b) {
      Real* dq = dq_ + (one_chunk_ ? 0 : b * p_.head_dim * kBlockQ);
      if (first) std::memset(dq, 0, sizeof(Real) * static_cast<size_t>(p_.head_dim * kBlockQ));
      const int rows = rows_of(b);
      KeyRange range = tile_.visibility.keys(b * kBlockQ, b * kBlockQ + rows);
      range = {larger(range.begin, keys.begin), smaller(range.end, keys.end)};
      if (range.begin < range.end) block(b, range, dq);
      if (last && p_.dq.data != nullptr) write_dq(b, dq);
    }
  }

 private:
  int rows_of(int64_t b) const {
    return static_cast<int>(smaller<int64_t>(tile_.sequence.seqlen_q - b * kBlockQ, kBlockQ));
  }

  // The statistics of block b.
  void prepare_rows_of(int64_t b) {
    RowStatistics<Real>& row = rows_[b];
    tile_.i = b * kBlockQ;
    tile_.rows = rows_of(b);
    bool coarse;
    load_lse(tile_.queries(p_.lse, 1), tile_.rows, row, &coarse);
    const HeadView out = tile_.queries(p_.out, p_.head_dim_v);
    const HeadView dout = tile_.queries(p_.dout, p_.head_dim_v);
    const HeadView dlse = tile_.queries(p_.dlse, 1);
    for (int q = 0; q < kBlockQ; ++q) {
      row.delta[q] = 0;
      if (q >= tile_.rows || row.dead(q)) continue;
      row.delta[q] = dot_rows<Real>(dout, out, q);
      if (p_.dlse.data != nullptr) row.delta[q] -= *dlse.row<const Real>(q);
    }
    if (coarse || p_.dweights.data != nullptr) {
      tile_.select_queries(tile_.i, tile_.rows);
      if (coarse) refine(tile_, visible_keys(), row);
      if (p_.dweights.data != nullptr) add_weights_to_delta(row);
    }
  }

  KeyRange visible_keys() const { return tile_.visibility.keys(tile_.i, tile_.i + tile_.rows); }

  void add_weights_to_delta(RowStatistics<Real>& row) {
    alignas(64) Real unused[kBlockQ] = {};
    uint64_t keep[kBlockK];
    const auto factor = Vec<Real>::set1(static_cast<Real>(tile_.dropout.factor()));
    tile_.for_each_tile(visible_keys(), kTileKeys, [&] {
      tile_.compute(unused);
      probability_tile<E>(tile_.map, tile_.formula, row, tile_.scores);
      load_bias<Real>(tile_.tile(), p_.dweights, dweights_);
      const bool dropout = tile_.dropout.active();
      if (dropout) tile_.dropout.draw(tile_.tile(), keep);
      for_each_visible(tile_.map, [&](int c, int g) {
        const int64_t at = c * kBlockQ + g * kLanes;
        auto weight = Vec<Real>::load(tile_.scores + at) * factor;
        if (dropout) weight = select(lanes_of(keep, c, g), weight, Vec<Real>::zero());
        Real* delta = row.delta + g * kLanes;
        fma(weight, Vec<Real>::load(dweights_ + at), Vec<Real>::load(delta)).store(delta);
      });
    });
  }

  void block(int64_t b, KeyRange range, Real* dq) {
    const RowStatistics<Real>& row = rows_[b];
    tile_.select_queries(b * kBlockQ, rows_of(b));
    load_dout(row);
    tile_.for_each_tile(range, kTileKeys, [&] {
      alignas(64) Real unused[kBlockQ] = {};
      tile_.compute(unused);
      multiply_values();
      compute_gradients(row);
      const TileMap& map = tile_.map;
      for (int s = 0; s < map.num_segments; ++s) accumulate(map.segments[s], dq);
    });
  }

  // The rows of q and dout in the forms that the products want. Rows of dout that belong to queries
  // without visible keys count as 0, whatever they hold.
  void load_dout(const RowStatistics<Real>& row) {
    Scratch& s = scratch();
    uint8_t keep[kBlockQ];
    bool all = true;
    for (int q = 0; q < tile_.rows; ++q) {
      keep[q] = !row.dead(q);
      all &= keep[q] != 0;
    }
    const uint8_t* keep_rows = all ? nullptr : keep;
    const KeyRange range{0, tile_.rows};
    const HeadView dout = tile_.queries(p_.dout, p_.head_dim_v);
    pack_columns<E>(prepare_rows<E>(dout, range, keep_rows, s.dout_rows), tile_.rows, units_v_,
                    dout_);
    if (p_.dv.data != nullptr) {
      dout_lanes_ = prepare_pairs<E>(dout, range, keep_rows, lanes_up(p_.head_dim_v), s.dout_lanes,
                                     s.dout_rows);
    }
    if (p_.dk.data != nullptr) {
      q_lanes_ = prepare_pairs<E>(tile_.queries(p_.q, p_.head_dim), range, nullptr,
                                  lanes_up(p_.head_dim), s.q_lanes, s.q_rows);
    }
  }

  // dP = V dO^T
  void multiply_values() {
    for (int s = 0; s < tile_.map.num_segments; ++s) {
      const Segment& segment = tile_.map.segments[s];
      multiply<E, Form::kRows>({v_.row(tile_.j + segment.begin), v_.stride, dout_, kBlockQ,
                                dp_ + segment.begin * kBlockQ, kBlockQ, segment.end - segment.begin,
                                units_v_, segment.group_begin, segment.group_end},
                               Overwrite{});
    }
  }

  void compute_gradients(const RowStatistics<Real>& row) {
    uint64_t keep[kBlockK];
    const Tile tile = tile_.tile();
    if (tile_.dropout.active()) tile_.dropout.draw(tile, keep);
    if (dweights_ != nullptr) load_bias<Real>(tile, p_.dweights, dweights_);
    if (ds_full_ != nullptr) {
      std::memset(ds_full_, 0, sizeof(Real) * static_cast<size_t>(tile_.map.keys * kBlockQ));
    }
    if constexpr (E::kPair == 1) {  // in place
      p_tile_ = tile_.scores;
      ds_tile_ = dp_;
    }
    gradient_tile<E>(
        tile_.map, tile_.formula, row,
        {tile_.scores, dp_, dweights_, tile_.slope, tile_.dropout.active() ? keep : nullptr,
         static_cast<Real>(tile_.dropout.factor()), p_tile_, ds_tile_, ds_pairs_, ds_full_});
    if (ds_full_ != nullptr) add_to_bias_gradient<Real>(tile, p_.dbias, ds_full_);
  }

  // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T over one segment.
  void accumulate(const Segment& segment, Real* dq) {
    const int64_t keys = segment.end - segment.begin;
    const int64_t key = tile_.j + segment.begin - sums_->first;
    const int lane = segment.group_begin * kLanes;
    const int64_t depth =
        units<E>(smaller(segment.group_end * kLanes, tile_.rows)) - lane / E::kPair;
    const int64_t offset = segment.begin * kBlockQ + lane;
    if (p_.dv.data != nullptr) {
      multiply<E, Form::kRows>(
          {reinterpret_cast<const Unit*>(p_tile_ + offset), kBlockQ / E::kPair,
           dout_lanes_.row(lane / E::kPair), dout_lanes_.stride, sums_->dv + key * sums_->stride_v,
           sums_->stride_v, keys, depth, 0, static_cast<int>(sums_->stride_v / kLanes)},
          Accumulate{});
    }
    if (p_.dk.data != nullptr) {
      multiply<E, Form::kRows>(
          {reinterpret_cast<const Unit*>(ds_tile_ + offset), kBlockQ / E::kPair,
           q_lanes_.row(lane / E::kPair), q_lanes_.stride, sums_->dk + key * sums_->stride_k,
           sums_->stride_k, keys, depth, 0, static_cast<int>(sums_->stride_k / kLanes)},
          Accumulate{});
    }
    if (p_.dq.data != nullptr) {
      const Unit* ds = E::kPair == 1 ? reinterpret_cast<const Unit*>(ds_tile_) : ds_pairs_;
      multiply<E, Form::kColumns>(
          {k_pairs_.row((tile_.j + segment.begin) / E::kPair), k_pairs_.stride,
           ds + segment.begin / E::kPair * kBlockQ, kBlockQ, dq, kBlockQ, p_.head_dim,
           units<E>(keys), segment.group_begin, segment.group_end},
          Accumulate{});
    }
  }

  void write_dq(int64_t b, const Real* dq) {
    alignas(64) Real factor[kBlockQ];
    for (Real& x : factor) x = static_cast<Real>(p_.scale);
    tile_.i = b * kBlockQ;
    write_columns(dq, factor, rows_of(b), tile_.queries(p_.dq, p_.head_dim));
  }

  const BackwardParams& p_;
  HeadScores<E> tile_;
  const int64_t units_v_;  // of head_dim_v
  Rows<E> v_;
  Rows<E> k_pairs_;
  Rows<E> q_lanes_;     // [query unit][column of q]
  Rows<E> dout_lanes_;  // [query unit][column of v]
  Unit* dout_;          // [unit][query]
  Real* dp_;            // [key][query]
  Element* p_tile_ = nullptr;
  Element* ds_tile_ = nullptr;
  Unit* ds_pairs_ = nullptr;
  Real* ds_full_ = nullptr;
  Real* dweights_ = nullptr;
  bool one_chunk_;
  Real* dq_;  // [block][column][query], or one block if its sum is complete after one chunk
  RowStatistics<Real>* rows_;
  const KeyGradients<Real>* sums_ = nullptr;
};

// The gradients of all heads that share one head of keys and values.
template <class E>
class BackwardGroup {
  using Real = typename E::Real;

 public:
  BackwardGroup(const BackwardParams& p, const Sequence& sequence, int64_t head_kv)
      : p_(p),
        sequence_(sequence),
        heads_(p.num_heads / p.num_heads_kv),
        first_head_(head_kv * heads_),
        keys_(Visibility(p, sequence, first_head_).keys()) {
    keys_.begin = keys_.begin / E::kPair * E::kPair;
    const int64_t rows = heads_ == 1 ? kChunk : keys_.end - keys_.begin;
    sums_.stride_k = lanes_up(p.head_dim);
    sums_.stride_v = lanes_up(p.head_dim_v);
    sums_.dk = scratch().dk.get<Real>(rows * sums_.stride_k);
    sums_.dv = scratch().dv.get<Real>(rows * sums_.stride_v);
  }

  void run() {
    for (int64_t h = 0; h < heads_; ++h) {
      BackwardHead<E> head(p_, sequence_, first_head_ + h);
      KeyRange chunk{keys_.begin, keys_.begin};
      do {  // once even without visible keys: dq must be written
        chunk = {chunk.end, smaller(chunk.end + kChunk, keys_.end)};
        sums_.first = heads_ == 1 ? chunk.begin : keys_.begin;
        if (h == 0) clear(chunk);
        head.chunk(chunk, chunk.begin == keys_.begin, chunk.end == keys_.end, sums_);
        if (h == heads_ - 1) write(chunk);
      } while (chunk.end < keys_.end);
    }
    // Keys that no query can see; the one before the first may have been counted for its pair.
    const KeyRange seen = Visibility(p_, sequence_, first_head_).keys();
    clear_hidden({0, seen.begin});
    clear_hidden({seen.end, sequence_.seqlen_k});
  }

 private:
  HeadView view(const View4& gradient, int64_t columns) const {
    return key_view(p_, gradient, sequence_, first_head_, columns);
  }

  void clear_hidden(KeyRange keys) {
    if (p_.dk.data != nullptr) zero_rows<Real>(view(p_.dk, p_.head_dim), keys);
    if (p_.dv.data != nullptr) zero_rows<Real>(view(p_.dv, p_.head_dim_v), keys);
  }

  void clear(KeyRange chunk) {
    const size_t rows = static_cast<size_t>(chunk.end - chunk.begin);
    const int64_t row = chunk.begin - sums_.first;
    std::memset(sums_.dk + row * sums_.stride_k, 0, sizeof(Real) * rows * sums_.stride_k);
    std::memset(sums_.dv + row * sums_.stride_v, 0, sizeof(Real) * rows * sums_.stride_v);
  }

  void write(KeyRange chunk) {
    const int64_t row = chunk.begin - sums_.first;
    if (p_.dk.data != nullptr) {
      write_rows(sums_.dk + row * sums_.stride_k, sums_.stride_k, static_cast<Real>(p_.scale),
                 view(p_.dk, p_.head_dim), chunk);
    }
    if (p_.dv.data != nullptr) {
      write_rows(sums_.dv + row * sums_.stride_v, sums_.stride_v, Real(1),
                 view(p_.dv, p_.head_dim_v), chunk);
    }
  }

  const BackwardParams& p_;
  const Sequence sequence_;
  const int64_t heads_;
  const int64_t first_head_;
  KeyRange keys_;
  KeyGradients<Real> sums_;
};

}  // namespace

void backward(const BackwardParams& p) {
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    // Whatever adds to the same numbers is one task, which keeps the order of sums fixed: heads
    // that share keys, and those that share a slice of dbias.
    const bool bias = p.dbias.data != nullptr;
    const int64_t batch_tasks = bias && p.dbias.stride[0] == 0 ? 1 : p.batch;
    const int64_t head_tasks = bias && p.dbias.stride[1] == 0 ? 1 : p.num_heads_kv;
    if (p.batch == 0 || p.num_heads_kv == 0) return;
    parallel_for(useful_threads(p, 10), batch_tasks * head_tasks, [&](int64_t task) {
      const int64_t batch = task / head_tasks, head = task % head_tasks;
      for (int64_t b = batch; b < p.batch; b += batch_tasks) {
        const Sequence sequence(p, b);
        for (int64_t h = head; h < p.num_heads_kv; h += head_tasks) {
          BackwardGroup<E>(p, sequence, h).run();
        }
      }
    });
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
