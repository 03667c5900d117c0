// Forward attention for the queries of a decoding step, which only has to read the keys and
// values as fast as memory delivers them. The rows of all query heads that share keys take one pass
// over K and V in place, in the dtype of the tensors. Scores are [row][key], with the keys in
// vector lanes.
#pragma once

#include "attention/cpu/gemm.h"
#include "attention/cpu/pack.h"
#include "attention/cpu/prefetch.h"
#include "attention/cpu/softmax.h"
#include "attention/cpu/tile_rows.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

constexpr int kDecodeRows = 16;                   // queries of all heads that take one pass
constexpr int kPackedRows = 4;                    // from so many rows on, transposing the keys pays
constexpr int kPackedKeys = 32;                   // that are transposed at once
constexpr int64_t kNearBytes = int64_t{4} << 20;  // of K and V that caches may still hold

struct DecodeBuffers {
  Buffer keep, q, k, v, columns, scores, bias, acc;
};

// The heads [first_head, first_head + num_heads) of one sequence, which share keys.
struct DecodeTask {
  Sequence sequence;
  int64_t first_head;
  int num_heads;
};

// How many query heads one task takes: those that share keys, and what hides keys from them.
FUSED_ATTN_INLINE int heads_together(const Params& p, int64_t seqlen_q) {
  const bool shared = (p.mask.data == nullptr || p.mask.stride[1] == 0) &&
                      (p.bias.data == nullptr || p.bias.stride[1] == 0);
  if (!shared || seqlen_q == 0) return 1;
  return static_cast<int>(
      larger<int64_t>(1, smaller<int64_t>(p.num_heads / p.num_heads_kv, kDecodeRows / seqlen_q)));
}

template <class E, class T>  // T: element of q, k, v
class DecodePass {
  using Real = typename E::Real;
  using V = Vec<Real>;

 public:
  using Number = Real;  // of a record

  DecodePass(const Params& p, const DecodeTask& task, DecodeBuffers& buffers)
      : p_(p),
        task_(task),
        queries_(static_cast<int>(task.sequence.seqlen_q)),
        rows_(queries_ * task.num_heads),
        visibility_(p, task.sequence, task.first_head),
        formula_(p),
        dropout_(p),
        k_(key_view(p, p.k, task.sequence, task.first_head, p.head_dim), buffers.k),
        v_(key_view(p, p.v, task.sequence, task.first_head, p.head_dim_v), buffers.v),
        width_(ceil_div(p.head_dim, kLanes) * kLanes),
        width_v_(ceil_div(p.head_dim_v, kLanes) * kLanes),
        by_rows_(queries_ == 1 && !dropout_.active()),
        cold_(k_.in_place() && v_.in_place() &&
              (p.head_dim + p.head_dim_v) * p.batch * p.num_heads_kv * p.seqlen_k *
                      int64_t{sizeof(T)} >
                  kNearBytes),
        lines_k_(ceil_div(p.head_dim * sizeof(T), ByteRows::kLine)),
        lines_v_(ceil_div(p.head_dim_v * sizeof(T), ByteRows::kLine)) {
    // One query a head needs no look at the keys: what a mask or the bias hides is left out below.
    if (p.bias.data != nullptr && !by_rows_) {
      keep_ = keys_to_keep<Real>(p, task.sequence, task.first_head, visibility_, buffers.keep);
    }
    if (p.bias.data != nullptr) bias_ = buffers.bias.get<Real>(kBlockK * kStrideQ);
    q_ = buffers.q.get<Real>(kDecodeRows * width_);
    if (rows_ >= kPackedRows) columns_ = buffers.columns.get<Real>(width_ * kPackedKeys);
    scores_ = buffers.scores.get<Real>(kBlockK * kStrideQ);
    acc_ = buffers.acc.get<Real>(kDecodeRows * width_v_);
    std::memset(acc_, 0, sizeof(Real) * static_cast<size_t>(rows_ * width_v_));
    std::memset(q_, 0, sizeof(Real) * static_cast<size_t>(kDecodeRows * width_));
    for (int h = 0; h < task.num_heads; ++h) {
      const HeadView q = query_view(p, p.q, task.sequence, task.first_head + h, p.head_dim);
      for (int i = 0; i < queries_; ++i) {
        copy_row<E>(q, i, width_, q_ + (h * queries_ + i) * width_);
      }
    }
    state_.reset();
  }

  // Takes in part `part` of `parts` of the keys.
  void run(int64_t part, int64_t parts) {
    const KeyRange range = visibility_.keys(0, queries_);
    const int64_t tiles = ceil_div(range.end - range.begin, kBlockK);
    const int64_t end = smaller(range.end, range.begin + tiles * (part + 1) / parts * kBlockK);
    for (int64_t j = range.begin + tiles * part / parts * kBlockK; j < end; j += kBlockK) {
      visibility_.tile(0, queries_, j, static_cast<int>(smaller<int64_t>(end - j, kBlockK)), map_);
      if (map_.seen == Seen::kNone) continue;
      list_keys(j);
      if (count_ == 0) continue;
      if (cold_) prefetcher_.start(byte_rows(v_.first(), v_.stride(), p_.head_dim_v, map_.keys));
      if (rows_ < kPackedRows) {
        multiply_queries();
      } else {
        multiply_packed_keys();
      }
      if (by_rows_ && !formula_.plain) {
        final_scores_of_rows(j);
        softmax_of_rows<false>();
      } else if (by_rows_ || (formula_.plain && !dropout_.active() && map_.seen == Seen::kAll)) {
        softmax_of_rows<true>();
      } else {
        for (int h = 0; h < task_.num_heads; ++h) softmax_of_head(h, j);
      }
      if (cold_) {
        prefetcher_.start(byte_rows(k_.first() + kBlockK * k_.stride(), k_.stride(), p_.head_dim,
                                    smaller<int64_t>(end - j - kBlockK, kBlockK)));
      }
      accumulate_output();
    }
  }

  // What a part of the keys comes to, for merge(): numbers of a record.
  static int64_t record_size(const Params& p) {
    return kDecodeRows * (ceil_div(p.head_dim_v, kLanes) * kLanes + 4);
  }
  void save(Real* record) const {
    std::memcpy(record, acc_, sizeof(Real) * static_cast<size_t>(rows_ * width_v_));
    record += kDecodeRows * width_v_;
    V::load(state_.largest).store(record);
    V::load(state_.shift.base).store(record + kDecodeRows);
    V::load(state_.shift.offset).store(record + 2 * kDecodeRows);
    V::load(state_.sum).store(record + 3 * kDecodeRows);
  }

  // Takes in what save() wrote of another part of the keys.
  void merge(const Real* record) {
    const Real* statistics = record + kDecodeRows * width_v_;
    const Shift<Real> mine = state_.shift;
    Shift<Real> theirs;
    V::load(statistics + kDecodeRows).store(theirs.base);
    V::load(statistics + 2 * kDecodeRows).store(theirs.offset);
    max(V::load(state_.largest), V::load(statistics)).store(state_.largest);
    alignas(64) Real keep[kLanes], add[kLanes];
    const auto corrections = [&](auto plain) {
      constexpr bool kPlain = decltype(plain)::value;
      const V scale = V::set1(formula_.log2_scale());
      renew_shift<kPlain>(state_, 0, scale, state_.shift);
      correction_between<kPlain>(mine, state_.shift, 0, scale).store(keep);
      correction_between<kPlain>(theirs, state_.shift, 0, scale).store(add);
    };
    formula_.plain ? corrections(std::true_type{}) : corrections(std::false_type{});
    fma(V::load(statistics + 3 * kDecodeRows), V::load(add), V::load(state_.sum) * V::load(keep))
        .store(state_.sum);
    for (int r = 0; r < rows_; ++r) {
      for (int64_t d = r * width_v_; d < (r + 1) * width_v_; d += kLanes) {
        fma(V::load(record + d), V::set1(add[r]), V::load(acc_ + d) * V::set1(keep[r]))
            .store(acc_ + d);
      }
    }
  }

  void write() {
    alignas(64) Real factor[kBlockQ];
    alignas(64) Real lse[kBlockQ];
    finish(state_, formula_, dropout_, rows_, factor, lse);
    for (int r = 0; r < rows_; ++r) {
      const int64_t head = task_.first_head + r / queries_, i = r % queries_;
      const HeadView out = query_view(p_, p_.out, task_.sequence, head, p_.head_dim_v);
      write_rows(acc_ + r * width_v_, width_v_, factor[r], out, {i, i + 1});
      if (p_.lse.data == nullptr) continue;
      *query_view(p_, p_.lse, task_.sequence, head, 1).template row<Real>(i) = lse[r];
    }
  }

 private:
  // The keys of the tile that some query sees. Tiles that all see have the same list.
  void list_keys(int64_t j) {
    k_.select(j, map_.keys);
    v_.select(j, map_.keys);
    const uint64_t* visible = map_.mask();
    const bool hides = by_rows_ && p_.bias.data != nullptr && load_bias_of_rows(j);
    const bool all = map_.seen == Seen::kAll && keep_ == nullptr && !hides;
    if (all && listed_ >= map_.keys) {
      count_ = map_.keys;
      return;
    }
    const int64_t stride_k = k_.stride(), stride_v = v_.stride();
    int count = 0;
    for (int c = 0; c < map_.keys; ++c) {
      if (visible != nullptr && visible[c] == 0) continue;
      if (keep_ != nullptr && !keep_[j + c]) continue;
      if (by_rows_ && p_.bias.data != nullptr) {
        if (bias_[c] == -std::numeric_limits<Real>::infinity()) continue;
        bias_[count] = bias_[c];  // side by side as the scores
      }
      key_[count] = c;
      k_row_[count] = c * stride_k;
      v_row_[count] = c * stride_v;
      ++count;
    }
    count_ = count;
    listed_ = all ? count : 0;
  }

  // Loads the tile's bias, which all rows share where there is one query a head. Does it hide a
  // key?
  bool load_bias_of_rows(int64_t j) {
    V least = V::zero();
    with_bias_dtype<Real>(p_.bias.dtype, [&](auto* tag) {
      using B = std::remove_pointer_t<decltype(tag)>;
      const B* from = at<const B>(p_.bias, task_.sequence.batch, task_.first_head, 0, j);
      const int64_t stride = p_.bias.stride[3];
      for (int c = 0; c < map_.keys; c += kLanes) {
        const int width = smaller(map_.keys - c, kLanes);
        if (stride == 1) {
          load_as<Real>(from + c, width).store(bias_ + c);
        } else {
          for (int n = 0; n < kLanes; ++n) {
            bias_[c + n] = n < width ? to_real<Real>(from[(c + n) * stride]) : Real(0);
          }
        }
        least = min(V::load(bias_ + c), least);
      }
    });
    return greater(V::set1(kLowest<Real>), least) != 0;
  }

  const T* k_row(int n) const { return k_.first() + k_row_[n]; }
  const T* v_row(int n) const { return v_.first() + v_row_[n]; }

  // 16 keys at once, row by row: the order in which memory is read fastest.
  void multiply_queries() {
    for (int begin = 0; begin < count_; begin += kLanes) {
      for (int r = 0; r < rows_; ++r) {
        V partial[kLanes];
        for (V& x : partial) x = V::zero();
        add_products<kAccumulators / 2>(r, begin, 0, partial);
        sum_each(partial).store(weights_[r] + begin);
      }
    }
  }

  // The products of columns from d on; N vectors of the query stay in registers while they fit,
  // then half as many.
  template <int N>
  FUSED_ATTN_INLINE void add_products(int r, int begin, int64_t d, V (&partial)[kLanes]) {
    for (; d + N * kLanes <= p_.head_dim; d += N * kLanes) {
      add_product<N>(r, begin, d, kLanes, partial);
    }
    if (d == p_.head_dim) return;
    if constexpr (N > 1) {
      add_products<N / 2>(r, begin, d, partial);
    } else {
      add_product<1>(r, begin, d, static_cast<int>(p_.head_dim - d), partial);
    }
  }

  template <int N>
  FUSED_ATTN_INLINE void add_product(int r, int begin, int64_t d, int width, V (&partial)[kLanes]) {
    V q[N];
    FUSED_ATTN_UNROLL
    for (int i = 0; i < N; ++i) q[i] = V::load(q_ + r * width_ + d + i * kLanes);
    for (int n = 0; n < kLanes; ++n) {
      // Lanes beyond the last key are overwritten later.
      const T* row = k_row(smaller(begin + n, count_ - 1)) + d;
      if (d == 0) prefetcher_.fetch(lines_v_);
      V even = partial[n], odd = V::zero();
      FUSED_ATTN_UNROLL
      for (int i = 0; i < N; ++i) {
        V& sum = i % 2 == 0 ? even : odd;
        sum = fma(load_as<Real>(row + i * kLanes, N == 1 ? width : kLanes), q[i], sum);
      }
      partial[n] = N == 1 ? even : even + odd;
    }
  }

  // The same through columns of K, which are made once for all rows.
  void multiply_packed_keys() {
    constexpr int kStep = 4;  // rows of q_ beyond the last are 0, and tiles of 4 rows the best
    const int64_t rows = ceil_div(rows_, kStep) * kStep;
    for (int begin = 0; begin < count_; begin += kPackedKeys) {
      const int count = smaller(count_ - begin, kPackedKeys);
      for (int n = 0; n < count; n += kLanes) pack_keys(begin + n, smaller(count - n, kLanes), n);
      multiply<E, Form::kRows>({q_, width_, columns_, kPackedKeys, weights_[0] + begin, kBlockK,
                                rows, p_.head_dim, 0, static_cast<int>(ceil_div(count, kLanes))},
                               Overwrite{});
    }
  }

  // columns_[d][lane + n] = the listed key `begin` + n, n < count.
  void pack_keys(int begin, int count, int lane) {
    const int64_t lines = ceil_div(kLanes * kLanes * lines_v_, width_);
    for (int64_t d = 0; d < p_.head_dim; d += kLanes) {
      const int width = static_cast<int>(smaller<int64_t>(p_.head_dim - d, kLanes));
      prefetcher_.fetch(lines);
      V block[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        block[n] = n < count ? load_as<Real>(k_row(begin + n) + d, width) : V::zero();
      }
      transpose(block);
      for (int c = 0; c < width; ++c) block[c].store(columns_ + (d + c) * kPackedKeys + lane);
    }
  }

  // Scale, softcap, ALiBi and bias where there is one query a head: on rows, not on tiles.
  void final_scores_of_rows(int64_t j) {
    const bool bounded = p_.softcap > 0, has_bias = p_.bias.data != nullptr;
    const V scale = V::set1(bounded ? formula_.scale / formula_.softcap : formula_.scale);
    const V softcap = V::set1(formula_.softcap);
    const Real position = static_cast<Real>(task_.sequence.seqlen_k - task_.sequence.seqlen_q - j);
    alignas(64) Real apart[kBlockK];
    if (p_.alibi_slopes != nullptr) {
      for (int n = 0; n < kBlockK; ++n) apart[n] = position - static_cast<Real>(key_[n]);
    }
    for (int r = 0; r < rows_; ++r) {
      const V slope = V::set1(p_.alibi_slopes == nullptr
                                  ? Real(0)
                                  : static_cast<Real>(p_.alibi_slopes[task_.first_head + r]));
      for (int n = 0; n < count_; n += kLanes) {
        V score = V::load(weights_[r] + n);
        const V bias = has_bias ? V::load(bias_ + n) : V::zero();
        if (!bounded && p_.alibi_slopes == nullptr) {
          score = fma(score, scale, bias);
        } else {
          score = score * scale;
          if (bounded) score = softcap * tanh(score);
          if (p_.alibi_slopes != nullptr) score = score - slope * abs(V::load(apart + n));
          score = score + bias;
        }
        score.store(weights_[r] + n);
      }
    }
  }

  // Where every query sees all listed keys, vectors can run along the keys.
  template <bool kPlain>
  void softmax_of_rows() {
    const Real hidden = -std::numeric_limits<Real>::infinity();
    for (int r = 0; r < rows_; ++r) {
      for (int n = count_; n % kLanes != 0; ++n) weights_[r][n] = hidden;
      V most = V::load(weights_[r]);
      for (int n = kLanes; n < count_; n += kLanes) most = max(most, V::load(weights_[r] + n));
      state_.largest[r] = larger(state_.largest[r], largest(most));
    }
    const V scale = V::set1(formula_.log2_scale());
    const Shift<Real> before = state_.shift;
    renew_shift<kPlain>(state_, 0, scale, state_.shift);
    const V correction = correction_between<kPlain>(before, state_.shift, 0, scale);
    correction.store(state_.correction);
    alignas(64) Real sums[kLanes];
    for (int r = 0; r < rows_; ++r) {
      const V base = V::set1(state_.shift.base[r]), offset = V::set1(state_.shift.offset[r]);
      V total = V::zero();
      for (int n = 0; n < count_; n += kLanes) {
        const V score = V::load(weights_[r] + n) - base;
        const V p =
            kPlain ? exp2(clamp_exponent(fma(score, scale, offset))) : exp(clamp_natural(score));
        total = total + p;
        p.store(weights_[r] + n);
      }
      sums[r] = sum(total);
    }
    fma(V::load(state_.sum), correction, V::load(sums, rows_)).store(state_.sum);
  }

  // The general way, through a tile [key][query] as everywhere else, of which one group of queries
  // is in use.
  void softmax_of_head(int h, int64_t j) {
    scores_to_tile(h);
    const ScoreTile tile{p_, task_.sequence, task_.first_head + h, 0, queries_, j, map_};
    RunningSoftmax<Real> state;
    state.reset();
    copy_lanes(state_, h * queries_, state, 0);
    apply_formula<Real>(tile, formula_, scores_, bias_, nullptr, state.largest);
    uint64_t keep[kBlockK];
    const bool dropout = dropout_.active(), plain = formula_.plain;
    if (dropout) dropout_.draw(tile, keep);
    const auto run = dropout
                         ? (plain ? softmax_tile<E, true, true> : softmax_tile<E, false, true>)
                         : (plain ? softmax_tile<E, true, false> : softmax_tile<E, false, false>);
    run(map_, 1, formula_.log2_scale(), keep, scores_, scores_, state);
    copy_lanes(state, 0, state_, h * queries_);
    probabilities_from_tile(h);
  }

  // The rows of one head.
  void copy_lanes(const RunningSoftmax<Real>& from, int first, RunningSoftmax<Real>& to,
                  int target) const {
    for (int i = 0; i < queries_; ++i) {
      to.largest[target + i] = from.largest[first + i];
      to.shift.base[target + i] = from.shift.base[first + i];
      to.shift.offset[target + i] = from.shift.offset[first + i];
      to.sum[target + i] = from.sum[first + i];
      to.correction[target + i] = from.correction[first + i];
    }
  }

  void scores_to_tile(int h) {
    if (count_ < map_.keys) {
      for (int c = 0; c < map_.keys; ++c) V::zero().store(scores_ + c * kStrideQ);
    }
    for (int begin = 0; begin < count_; begin += kLanes) {
      V block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < queries_ ? V::load(weights_[h * queries_ + i] + begin) : V::zero();
      }
      transpose(block);
      const int count = smaller(count_ - begin, kLanes);
      for (int n = 0; n < count; ++n) block[n].store(scores_ + key_[begin + n] * kStrideQ);
    }
  }

  void probabilities_from_tile(int h) {
    for (int begin = 0; begin < count_; begin += kLanes) {
      const int count = smaller(count_ - begin, kLanes);
      V block[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        block[n] = n < count ? V::load(scores_ + key_[begin + n] * kStrideQ) : V::zero();
      }
      transpose(block);
      for (int i = 0; i < queries_; ++i) block[i].store(weights_[h * queries_ + i] + begin);
    }
  }

  // acc = correction acc + probabilities V. A block of R rows and N vectors of columns stays in
  // registers for all keys of the tile.
  void accumulate_output() {
    int r = 0;
    add_rows<8>(r);
    add_rows<4>(r);
    add_rows<2>(r);
    add_rows<1>(r);
  }

  template <int R>
  void add_rows(int& r) {
    if constexpr (R <= kAccumulators) {
      for (; r + R <= rows_; r += R) add_columns<R, smaller(8, kAccumulators / R)>(r, 0);
    }
  }

  // Blocks of N vectors while they fit, then of half as many.
  template <int R, int N>
  void add_columns(int r, int64_t d) {
    for (; d + N * kLanes <= p_.head_dim_v; d += N * kLanes) add_block<R, N>(r, d, kLanes);
    if constexpr (N > 1) {
      if (d < p_.head_dim_v) add_columns<R, N / 2>(r, d);
    } else {
      if (d < p_.head_dim_v) add_block<R, 1>(r, d, static_cast<int>(p_.head_dim_v - d));
    }
  }

  template <int R, int N>
  FUSED_ATTN_INLINE void add_block(int r, int64_t d, int width) {
    // Each of the blocks of this tile prefetches its share of the next tile's keys.
    const int64_t lines = ceil_div(lines_k_, ceil_div(rows_ * width_v_, kAccumulators * kLanes));
    // Sums of their own for neighbouring keys hide the latency of additions in small blocks.
    constexpr int kStep = larger(1, smaller(4, kAccumulators) / (R * N));
    V sum[kStep][R][N];
    FUSED_ATTN_UNROLL
    for (int s = 0; s < kStep; ++s) {
      FUSED_ATTN_UNROLL
      for (int i = 0; i < R; ++i) {
        FUSED_ATTN_UNROLL
        for (int n = 0; n < N; ++n) sum[s][i][n] = V::zero();
      }
    }
    auto add = [&](int key, V(&to)[R][N]) {
      prefetcher_.fetch(lines);
      V v[N];
      FUSED_ATTN_UNROLL
      for (int n = 0; n < N; ++n) {
        v[n] = load_as<Real>(v_row(key) + d + n * kLanes, N == 1 ? width : kLanes);
      }
      FUSED_ATTN_UNROLL
      for (int i = 0; i < R; ++i) {
        const V p = V::set1(weights_[r + i][key]);
        FUSED_ATTN_UNROLL
        for (int n = 0; n < N; ++n) to[i][n] = fma(v[n], p, to[i][n]);
      }
    };
    int key = 0;
    for (; key + kStep <= count_; key += kStep) {
      FUSED_ATTN_UNROLL
      for (int s = 0; s < kStep; ++s) add(key + s, sum[s]);
    }
    for (; key < count_; ++key) add(key, sum[0]);
    FUSED_ATTN_UNROLL
    for (int i = 0; i < R; ++i) {
      const V correction = V::set1(state_.correction[r + i]);
      FUSED_ATTN_UNROLL
      for (int n = 0; n < N; ++n) {
        FUSED_ATTN_UNROLL
        for (int s = 1; s < kStep; ++s) sum[0][i][n] = sum[0][i][n] + sum[s][i][n];
        Real* acc = acc_ + (r + i) * width_v_ + d + n * kLanes;
        fma(V::load(acc), correction, sum[0][i][n]).store(acc);
      }
    }
  }

  // Of a block, in vectors: what the registers hold beside its operands.
  static constexpr int kAccumulators = larger(kRegisterVectors<Real> / 2, 16 / int{sizeof(Real)});

  const Params& p_;
  const DecodeTask task_;
  const int queries_;  // of each head
  const int rows_;     // queries of all heads
  const Visibility visibility_;
  const ScoreFormula<Real> formula_;
  const Dropout dropout_;
  TileRows<T> k_;
  TileRows<T> v_;
  const int64_t width_;    // of a row of q_
  const int64_t width_v_;  // of a row of acc_
  const bool by_rows_;     // no tile [key][query] is needed whatever the score is
  const bool cold_;        // K and V are surely not in a cache near the core
  const int64_t lines_k_;  // cache lines of a row of K
  const int64_t lines_v_;
  RowPrefetcher<1> prefetcher_;
  const uint8_t* keep_ = nullptr;
  Real* q_;                  // [row][column]
  Real* columns_ = nullptr;  // [column][key]
  Real* scores_;             // [key][query]
  Real* bias_ = nullptr;     // [key][query], or, by rows, of the listed keys
  Real* acc_;                // [row][column]

  TileMap map_;
  int count_ = 0;           // of the keys that some query sees
  int key_[kBlockK] = {};   // their positions in the tile
  int64_t k_row_[kBlockK];  // their rows, from that of the tile's first key on
  int64_t v_row_[kBlockK];
  int listed_ = 0;  // the list is 0, 1, ..., listed_ - 1 and may serve another tile
  alignas(64) Real weights_[kDecodeRows][kBlockK];  // scores, then probabilities of those keys
  RunningSoftmax<Real> state_;                      // of each row
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
