// Backward attention on the CPU. Chunks of keys, whose dK and dV stay in the cache, are the outer
// loop; blocks of queries the inner one. For a tile, with P recomputed from lse:
//
//   dV += P^T dO    dP = dO V^T    dS = P * (dP - delta)    dK += dS^T Q    dQ += dS K
//
// delta = rowsum(dO * O) - dlse + rowsum(weights * dweights). Compiled once per instruction set.
#include "attention/cpu/gradient.h"
#include "attention/cpu/kernels.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

constexpr int64_t kChunk = 512;     // keys whose float32 dK and dV fit the second-level cache
constexpr int64_t kTileKeys = 128;  // keys of a tile

struct Scratch {
  HeadBuffers head;
  Buffer v, k_pairs, k_rows, k_turned, q_lanes, q_rows, dout, dout_rows, dout_lanes, dp, p, ds,
      ds_pairs, ds_full, dweights, slope, raw, dq, dk, dv, rows;
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

// dq of the queries of block `b` from its sums, [column][query].
template <class Real>
void write_query_gradient(const BackwardParams& p, const Sequence& sequence, int64_t head,
                          int64_t b, int rows, const Real* sums) {
  alignas(64) Real factor[kBlockQ];
  for (Real& x : factor) x = static_cast<Real>(p.scale);
  HeadView dq = query_view(p, p.dq, sequence, head, p.head_dim);
  dq.first += b * kBlockQ;
  write_columns(sums, factor, rows, dq);
}

template <class E>
class BackwardHead {
  using Real = typename E::Real;
  using Unit = typename E::Unit;
  using Element = typename E::Element;

 public:
  // For the keys of `range`. `dq` receives the sums of dq, [block][column][query]; null if they are
  // to be written.
  BackwardHead(const BackwardParams& p, const Sequence& sequence, int64_t head, KeyRange range,
               Real* dq)
      : p_(p),
        tile_(p, sequence, head, scratch().head),
        units_v_(units<E>(p.head_dim_v)),
        write_dq_(dq == nullptr && p.dq.data != nullptr) {
    Scratch& s = scratch();
    constexpr int64_t kTile = kTileKeys * kStrideQ;
    range.begin = larger(range.begin, tile_.visibility.keys().begin);
    v_ = prepare_rows<E>(key_view(p, p.v, sequence, head, p.head_dim_v), range, tile_.keep_keys,
                         s.v);
    k_columns_ = E::kPair == 1 ? ColumnRows<E>(tile_.k)
                               : ColumnRows<E>(key_view(p, p.k, sequence, head, p.head_dim), range,
                                               tile_.keep_keys, s.k_pairs, s.k_rows, s.k_turned);
    if (p.softcap > 0 || tile_.functions.has_slope())
      tile_.slope = s.slope.template get<Real>(kTile);
    dout_ = s.dout.template get<Unit>(units_v_ * kStrideQ);
    dp_ = s.dp.template get<Real>(kTile);
    if (E::kPair > 1) {
      p_tile_ = s.p.template get<Element>(kTile);
      ds_tile_ = s.ds.template get<Element>(kTile);
      ds_pairs_ = s.ds_pairs.template get<Unit>(kTile / E::kPair);
    }
    if (tile_.functions.sums()) tile_.raw = s.raw.template get<Real>(kTile);
    if (p.dbias.data != nullptr || tile_.functions.sums())
      ds_full_ = s.ds_full.template get<Real>(kTile);
    if (p.dweights.data != nullptr) dweights_ = s.dweights.template get<Real>(kTile);
    const int64_t blocks = ceil_div(sequence.seqlen_q, kBlockQ);
    one_block_ = dq == nullptr && range.end - range.begin <= kChunk;
    dq_ = dq != nullptr
              ? dq
              : s.dq.template get<Real>((one_block_ ? 1 : blocks) * p.head_dim * kStrideQ);
    rows_ = s.rows.template get<RowStatistics<Real>>(blocks);
    for (int64_t b = 0; b < blocks; ++b) prepare_rows_of(b);
  }

  // The head that probably follows.
  void expect(const HeadOf& next, int64_t chunks) {
    const int64_t group = p_.num_heads / p_.num_heads_kv;
    const bool new_keys =
        next.head / group != tile_.head / group || next.sequence.batch != tile_.sequence.batch;
    const auto keys = [&](const View4& view, int64_t columns) {
      return new_keys ? tile_.keys_of(next, view, columns) : ByteRows{};
    };
    tile_.prefetch_head(next,
                        {tile_.queries_of(next, p_.dout, p_.head_dim_v),
                         tile_.queries_of(next, p_.out, p_.head_dim_v), keys(p_.k, p_.head_dim),
                         keys(p_.v, p_.head_dim_v)},
                        chunks * ceil_div(tile_.sequence.seqlen_q, kBlockQ));
  }

  // All blocks of queries against the keys of one chunk.
  void chunk(KeyRange keys, bool first, bool last, const KeyGradients<Real>& sums) {
    sums_ = &sums;
    const int64_t blocks = ceil_div(tile_.sequence.seqlen_q, kBlockQ);
    for (int64_t b = 0; b < blocks; ++b) {
      Real* dq = dq_ + (one_block_ ? 0 : b * p_.head_dim * kStrideQ);
      if (first) std::memset(dq, 0, sizeof(Real) * static_cast<size_t>(p_.head_dim * kStrideQ));
      const int rows = rows_of(b);
      KeyRange range = tile_.visibility.keys(b * kBlockQ, b * kBlockQ + rows);
      range = {larger(range.begin, keys.begin), smaller(range.end, keys.end)};
      if (range.begin < range.end) block(b, range, dq);
      if (last && write_dq_) write_dq(b, dq);
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
    const bool too_large = load_lse(tile_.queries(p_.lse, 1), tile_.rows, row);
    const HeadView out = tile_.queries(p_.out, p_.head_dim_v);
    const HeadView dout = tile_.queries(p_.dout, p_.head_dim_v);
    const HeadView dlse = tile_.queries(p_.dlse, 1);
    for (int q = 0; q < kBlockQ; ++q) {
      row.delta[q] = 0;
      if (q >= tile_.rows || row.dead(q)) continue;
      row.delta[q] = dot_rows<Real>(dout, out, q);
      if (p_.dlse.data != nullptr) row.delta[q] -= *dlse.row<const Real>(q);
    }
    if (too_large || p_.dweights.data != nullptr) {
      tile_.select_queries(tile_.i, tile_.rows);
      if (too_large) recompute_statistics(tile_, visible_keys(), row);
      if (p_.dweights.data != nullptr) add_weights_to_delta(row);
    }
  }

  KeyRange visible_keys() const { return tile_.visibility.keys(tile_.i, tile_.i + tile_.rows); }

  void add_weights_to_delta(RowStatistics<Real>& row) {
    uint64_t keep[kBlockK];
    const auto factor = Vec<Real>::set1(static_cast<Real>(tile_.dropout.factor()));
    tile_.for_each_tile(visible_keys(), kTileKeys, [&] {
      tile_.recompute();
      probability_tile<E>(tile_.map, tile_.formula, row, tile_.scores);
      load_bias<Real>(tile_.tile(), p_.dweights, dweights_);
      const bool dropout = tile_.dropout.active();
      if (dropout) tile_.dropout.draw(tile_.tile(), keep);
      for_each_visible(tile_.map, [&](int c, int g) {
        const int64_t at = c * kStrideQ + g * kLanes;
        auto weight = Vec<Real>::load(tile_.scores + at) * factor;
        if (dropout) weight = select(lanes_of(keep, c, g), weight, Vec<Real>::zero());
        Real* delta = row.delta + g * kLanes;
        fma(weight, Vec<Real>::load(dweights_ + at), Vec<Real>::load(delta)).store(delta);
      });
    });
  }

  void block(int64_t b, KeyRange range, Real* dq) {
    const RowStatistics<Real>& row = rows_[b];
    tile_.prefetch_block(write_dq_ ? p_.dq : View4{}, p_.head_dim, b * kBlockQ,
                         tile_.sequence.seqlen_q,
                         2 * product_tiles<Real>(rows_of(b), range.end - range.begin));
    tile_.select_queries(b * kBlockQ, rows_of(b));
    load_dout(row);
    tile_.for_each_tile(range, kTileKeys, [&] {
      tile_.recompute();
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
      multiply<E, Form::kRows>(
          {v_.row(tile_.j + segment.begin), v_.stride, dout_, kStrideQ,
           dp_ + segment.begin * kStrideQ, kStrideQ, segment.end - segment.begin, units_v_,
           segment.group_begin, segment.group_end},
          then_prefetch(Overwrite{}, tile_.prefetcher));
    }
  }

  void compute_gradients(const RowStatistics<Real>& row) {
    uint64_t keep[kBlockK];
    const ScoreTile tile = tile_.tile();
    if (tile_.dropout.active()) tile_.dropout.draw(tile, keep);
    if (dweights_ != nullptr) load_bias<Real>(tile, p_.dweights, dweights_);
    if (ds_full_ != nullptr) {
      std::memset(ds_full_, 0, sizeof(Real) * static_cast<size_t>(tile_.map.keys * kStrideQ));
    }
    if constexpr (E::kPair == 1) {  // in place
      p_tile_ = tile_.scores;
      ds_tile_ = dp_;
    }
    gradient_tile<E>(
        tile_.map, tile_.formula, row,
        {tile_.scores, dp_, dweights_, tile_.slope, tile_.dropout.active() ? keep : nullptr,
         static_cast<Real>(tile_.dropout.factor()), p_tile_, ds_tile_, ds_pairs_, ds_full_});
    if (p_.dbias.data != nullptr) add_to_bias_gradient<Real>(tile, p_.dbias, ds_full_);
    if (tile_.functions.sums()) tile_.functions.sum_up(tile, tile_.raw, ds_full_);
  }

  // dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T over one segment.
  void accumulate(const Segment& segment, Real* dq) {
    const int64_t keys = segment.end - segment.begin;
    const int64_t key = tile_.j + segment.begin - sums_->first;
    const int lane = segment.group_begin * kLanes;
    const int64_t depth =
        units<E>(smaller(segment.group_end * kLanes, tile_.rows)) - lane / E::kPair;
    const int64_t offset = segment.begin * kStrideQ + lane;
    if (p_.dv.data != nullptr) {
      multiply<E, Form::kRows>(
          {reinterpret_cast<const Unit*>(p_tile_ + offset), kStrideQ / E::kPair,
           dout_lanes_.row(lane / E::kPair), dout_lanes_.stride, sums_->dv + key * sums_->stride_v,
           sums_->stride_v, keys, depth, 0, static_cast<int>(sums_->stride_v / kLanes)},
          Accumulate{});
    }
    if (p_.dk.data != nullptr) {
      multiply<E, Form::kRows>(
          {reinterpret_cast<const Unit*>(ds_tile_ + offset), kStrideQ / E::kPair,
           q_lanes_.row(lane / E::kPair), q_lanes_.stride, sums_->dk + key * sums_->stride_k,
           sums_->stride_k, keys, depth, 0, static_cast<int>(sums_->stride_k / kLanes)},
          Accumulate{});
    }
    if (p_.dq.data != nullptr) {
      const Unit* ds = E::kPair == 1 ? reinterpret_cast<const Unit*>(ds_tile_) : ds_pairs_;
      multiply<E, kOfColumns<E>>(
          {k_columns_.from(tile_.j + segment.begin), k_columns_.stride(),
           ds + segment.begin / E::kPair * kStrideQ, kStrideQ, dq, kStrideQ, p_.head_dim,
           units<E>(keys), segment.group_begin, segment.group_end},
          Accumulate{});
    }
  }

  void write_dq(int64_t b, const Real* dq) {
    write_query_gradient(p_, tile_.sequence, tile_.head, b, rows_of(b), dq);
  }

  const BackwardParams& p_;
  HeadScores<E> tile_;
  const int64_t units_v_;  // of head_dim_v
  UnitRows<E> v_;
  ColumnRows<E> k_columns_;
  UnitRows<E> q_lanes_;     // [query unit][column of q]
  UnitRows<E> dout_lanes_;  // [query unit][column of v]
  Unit* dout_;              // [unit][query]
  Real* dp_;                // [key][query]
  Element* p_tile_ = nullptr;
  Element* ds_tile_ = nullptr;
  Unit* ds_pairs_ = nullptr;
  Real* ds_full_ = nullptr;
  Real* dweights_ = nullptr;
  const bool write_dq_;
  bool one_block_;
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
    sums_.stride_k = lanes_up(p.head_dim);
    sums_.stride_v = lanes_up(p.head_dim_v);
  }

  // Part `part` of `parts` of the keys. With more than one, `dq` receives the part's sums of dq,
  // [head][block][column][query], each head `dq_stride` numbers.
  // `next` is the head that probably follows, or null.
  void run(int64_t part, int64_t parts, Real* dq, int64_t dq_stride, const HeadOf* next) {
    const int64_t tiles = ceil_div(keys_.end - keys_.begin, kTileKeys);
    const KeyRange range{keys_.begin + tiles * part / parts * kTileKeys,
                         smaller(keys_.end, keys_.begin + tiles * (part + 1) / parts * kTileKeys)};
    const int64_t rows = heads_ == 1 ? kChunk : range.end - range.begin;
    sums_.dk = scratch().dk.get<Real>(rows * sums_.stride_k);
    sums_.dv = scratch().dv.get<Real>(rows * sums_.stride_v);
    for (int64_t h = 0; h < heads_; ++h) {
      BackwardHead<E> head(p_, sequence_, first_head_ + h, range,
                           dq == nullptr ? nullptr : dq + h * dq_stride);
      const HeadOf same_keys{sequence_, first_head_ + h + 1};
      const HeadOf* following = h + 1 < heads_ ? &same_keys : next;
      if (following != nullptr) {
        head.expect(*following, ceil_div(range.end - range.begin, kChunk));
      }
      KeyRange chunk{range.begin, range.begin};
      do {  // once even without visible keys: dq must be written
        chunk = {chunk.end, smaller(chunk.end + kChunk, range.end)};
        sums_.first = heads_ == 1 ? chunk.begin : range.begin;
        if (h == 0) clear(chunk);
        head.chunk(chunk, chunk.begin == range.begin, chunk.end == range.end, sums_);
        if (h == heads_ - 1) write(chunk);
      } while (chunk.end < range.end);
    }
    if (part > 0) return;
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

// Whatever adds to the same numbers must keep its order: heads that share keys are one unit of
// work, and units that share a slice of dbias form a row, which is worked off in order. Where rows
// are too few for the threads, units are cut into parts by keys.
template <class E>
class Backward {
  using Real = typename E::Real;

 public:
  Backward(const BackwardParams& p, int threads)
      : p_(p),
        threads_(threads),
        batch_rows_(shares(0) ? 1 : p.batch),
        head_rows_(shares(1) ? 1 : p.num_heads_kv),
        rows_(batch_rows_ * head_rows_),
        length_(p.batch * p.num_heads_kv / rows_) {}

  void run() const {
    const int64_t parts = number_of_parts();
    if (parts == 1) {
      parallel_for(threads_, rows_, [&](int64_t row) {
        for (int64_t n = 0; n < length_; ++n) unit(row, n, 0, 1, nullptr);
      });
      return;
    }
    static thread_local Buffer buffer;
    Real* dq = buffer.get<Real>(rows_ * parts * unit_stride());
    for (int64_t n = 0; n < length_; ++n) {
      parallel_for(threads_, rows_ * parts, [&](int64_t task) {
        unit(task / parts, n, task % parts, parts, dq + task * unit_stride());
      });
      if (p_.dq.data == nullptr) continue;
      parallel_for(threads_, rows_ * group() * blocks(), [&](int64_t task) {
        const int64_t row = task / blocks() / group();
        add_up(row, n, task / blocks() % group(), task % blocks(), parts,
               dq + row * parts * unit_stride());
      });
    }
  }

 private:
  static constexpr int64_t kTasksPerThread = 4;  // evens out what threads have to do
  static constexpr int64_t kMinPart = 2 * kTileKeys;

  // Do all slices along this dimension add to one slice of dbias?
  bool shares(int dimension) const {
    return p_.dbias.data != nullptr && p_.dbias.stride[dimension] == 0;
  }

  int64_t number_of_parts() const {
    // Parts of a head would add to the same gradients of vectors and tables.
    const bool sums = p_.functions != nullptr && p_.functions->sums;
    if (threads_ == 1 || rows_ >= kTasksPerThread * threads_ || shares(3) || sums) return 1;
    return larger<int64_t>(
        1, smaller(ceil_div(kTasksPerThread * threads_, rows_), p_.seqlen_k / kMinPart));
  }

  int64_t group() const { return p_.num_heads / p_.num_heads_kv; }
  int64_t blocks() const { return ceil_div(p_.seqlen_q, kBlockQ); }
  int64_t head_stride() const { return blocks() * p_.head_dim * kStrideQ; }
  int64_t unit_stride() const { return group() * head_stride(); }

  // Unit n of a row.
  int64_t batch_of(int64_t row, int64_t n) const {
    return row / head_rows_ + n / (p_.num_heads_kv / head_rows_) * batch_rows_;
  }
  int64_t head_of(int64_t row, int64_t n) const {
    return row % head_rows_ + n % (p_.num_heads_kv / head_rows_) * head_rows_;
  }

  void unit(int64_t row, int64_t n, int64_t part, int64_t parts, Real* dq) const {
    const Sequence sequence(p_, batch_of(row, n));
    // Threads take turns, more or less.
    const int64_t row_next = n + 1 < length_ ? row : row + threads_;
    const int64_t n_next = n + 1 < length_ ? n + 1 : 0;
    const bool last = parts > 1 || row_next >= rows_;
    const HeadOf next{Sequence(p_, batch_of(last ? row : row_next, n_next)),
                      head_of(row_next, n_next) * group()};
    BackwardGroup<E>(p_, sequence, head_of(row, n))
        .run(part, parts, dq, head_stride(), last ? nullptr : &next);
  }

  // The sums of all parts for block `b` of one head of a unit, whose sums of dq start at `dq`.
  void add_up(int64_t row, int64_t n, int64_t h, int64_t b, int64_t parts, Real* dq) const {
    const Sequence sequence(p_, batch_of(row, n));
    const int64_t left = sequence.seqlen_q - b * kBlockQ;
    if (left <= 0) return;
    Real* sums = dq + h * head_stride() + b * p_.head_dim * kStrideQ;
    for (int64_t part = 1; part < parts; ++part) {
      const Real* more = sums + part * unit_stride();
      for (int64_t i = 0; i < p_.head_dim * kStrideQ; i += kLanes) {
        (Vec<Real>::load(sums + i) + Vec<Real>::load(more + i)).store(sums + i);
      }
    }
    write_query_gradient(p_, sequence, head_of(row, n) * group() + h, b,
                         static_cast<int>(smaller<int64_t>(left, kBlockQ)), sums);
  }

  const BackwardParams& p_;
  const int threads_;
  const int64_t batch_rows_;
  const int64_t head_rows_;
  const int64_t rows_;
  const int64_t length_;  // units of a row
};

// The same call with out and lse, which the forward makes again.
template <class E>
BackwardParams with_forward(BackwardParams p) {
  using Real = typename E::Real;
  static thread_local Buffer buffer;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t head = p.rows_q, batch = packed ? 0 : p.num_heads * head;  // strides of lse
  const int64_t rows = p.num_heads * head * (packed ? 1 : p.batch);
  Real* lse = buffer.get<Real>(rows * (1 + p.head_dim_v));  // enough for out in a smaller dtype
  p.lse = {lse, p.lse.dtype, {batch, head, 1, 0}};
  p.out = {lse + rows, p.dtype, {batch * p.head_dim_v, head * p.head_dim_v, p.head_dim_v, 1}};
  forward(p);
  return p;
}

}  // namespace

void backward(const BackwardParams& p) {
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    if (p.batch == 0 || p.num_heads_kv == 0) return;
    const auto run = [](const BackwardParams& p) { Backward<E>(p, useful_threads(p, 10)).run(); };
    p.lse.data != nullptr ? run(p) : run(with_forward<E>(p));
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
