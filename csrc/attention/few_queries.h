// Forward attention for the few queries of a decoding step, which only has to read the keys and
// values as fast as memory delivers them: vectors run along the head dimension of K and V in place,
// in the dtype of the tensors. Scores go through the same [key][query] tile as everywhere, of which
// one group of queries is in use.
#pragma once

#include "attention/pack.h"
#include "attention/softmax.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

constexpr int kFewQueries = 4;

struct FewBuffers {
  Buffer keep, q, scores, bias, acc;
};

template <class E, class T>  // T: element of q, k, v
class FewQueries {
  using Real = typename E::Real;
  using V = Vec<Real>;

 public:
  // Can this sequence be computed here?
  static bool fits(const Params& p, const Sequence& sequence) {
    return sequence.seqlen_q <= kFewQueries && (p.k.stride[3] == 1 || p.head_dim == 1) &&
           (p.v.stride[3] == 1 || p.head_dim_v == 1);
  }

  FewQueries(const Params& p, const Sequence& sequence, int64_t head, FewBuffers& buffers)
      : p_(p),
        sequence_(sequence),
        head_(head),
        rows_(static_cast<int>(sequence.seqlen_q)),
        visibility_(p, sequence, head),
        formula_(p),
        dropout_(p),
        k_(key_view(p, p.k, sequence, head, p.head_dim)),
        v_(key_view(p, p.v, sequence, head, p.head_dim_v)),
        width_(ceil_div(p.head_dim, kLanes) * kLanes),
        width_v_(ceil_div(p.head_dim_v, kLanes) * kLanes) {
    // A mask needs no look at the keys: those that nobody sees are left out below.
    if (p.bias.data != nullptr) {
      keep_ = keys_to_keep<Real>(p, sequence, head, visibility_, buffers.keep);
      bias_ = buffers.bias.get<Real>(kBlockK * kBlockQ);
    }
    q_ = buffers.q.get<Real>(kFewQueries * width_);
    scores_ = buffers.scores.get<Real>(kBlockK * kBlockQ);
    acc_ = buffers.acc.get<Real>(kFewQueries * width_v_);
    std::memset(acc_, 0, sizeof(Real) * static_cast<size_t>(kFewQueries * width_v_));
    const HeadView q = query_view(p, p.q, sequence, head, p.head_dim);
    for (int r = 0; r < rows_; ++r) copy_row<E>(q, r, width_, q_ + r * width_);
  }

  void run() {
    state_.reset(formula_.plain, formula_.log2_scale());
    const KeyRange range = visibility_.keys(0, rows_);
    for (int64_t j = range.begin; j < range.end; j += kBlockK) {
      const int keys = static_cast<int>(smaller<int64_t>(range.end - j, kBlockK));
      visibility_.tile(0, rows_, j, keys, map_);
      if (map_.seen == Seen::kNone) continue;
      list_keys(j);
      if (count_ == 0) continue;
      multiply_queries();
      if (formula_.plain && !dropout_.active() && (rows_ == 1 || map_.seen == Seen::kAll)) {
        for (int r = 0; r < rows_; ++r) softmax_of_row(r);
      } else {
        softmax_of_few({p_, sequence_, head_, 0, rows_, j, map_});
      }
      accumulate_output();
    }
    write();
  }

 private:
  // The keys of the tile that some query sees.
  void list_keys(int64_t j) {
    count_ = 0;
    for (int c = 0; c < map_.keys; ++c) {
      if (map_.seen == Seen::kSome && map_.visible[c] == 0) continue;
      if (keep_ != nullptr && !keep_[j + c]) continue;
      key_[count_] = c;
      k_row_[count_] = k_.template row<const T>(j + c);
      v_row_[count_] = v_.template row<const T>(j + c);
      ++count_;
    }
  }

  // 16 keys at once: their 16 vectors of partial sums are transposed to be added up.
  void multiply_queries() {
    for (int first = 0; first < count_; first += kLanes) {
      const int count = smaller(count_ - first, kLanes);
      for (int r = 0; r < rows_; ++r) {
        V partial[kLanes];
        for (int n = 0; n < kLanes; ++n) {
          partial[n] = n < count ? products(k_row_[first + n], q_ + r * width_) : V::zero();
        }
        add_up(partial).store(weights_[r] + first);
      }
    }
  }

  // Row by row, the order in which memory is read fastest.
  FUSED_ATTN_INLINE V products(const T* row, const Real* q) const {
    V even = V::zero(), odd = V::zero();
    int64_t d = 0;
    for (; d + 2 * kLanes <= p_.head_dim; d += 2 * kLanes) {
      even = fma(load_as<Real>(row + d, kLanes), V::load(q + d), even);
      odd = fma(load_as<Real>(row + d + kLanes, kLanes), V::load(q + d + kLanes), odd);
    }
    for (; d < p_.head_dim; d += kLanes) {
      const int width = static_cast<int>(smaller<int64_t>(p_.head_dim - d, kLanes));
      even = fma(load_as<Real>(row + d, width), V::load(q + d), even);
    }
    return even + odd;
  }

  static FUSED_ATTN_INLINE V add_up(V (&partial)[kLanes]) {
    transpose(partial);
    FUSED_ATTN_UNROLL
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int n = 0; n < width; ++n) partial[n] = partial[n] + partial[n + width];
    }
    return partial[0];
  }

  // A query that sees all listed keys: vectors can run along the keys.
  void softmax_of_row(int r) {
    Real* weights = weights_[r];
    for (int n = count_; n % kLanes != 0; ++n) weights[n] = hidden_score<Real>(true);
    V most = V::set1(state_.largest[r]);
    for (int n = 0; n < count_; n += kLanes) most = max(most, V::load(weights + n));
    alignas(64) Real lanes[kLanes];
    most.store(lanes);
    for (Real lane : lanes) state_.largest[r] = larger(state_.largest[r], lane);
    const V scale = V::set1(formula_.log2_scale());
    const V offset = V::zero() - V::set1(state_.largest[r]) * scale;
    V total = V::zero();
    for (int n = 0; n < count_; n += kLanes) {
      const V p = exp2(fma(V::load(weights + n), scale, offset));
      total = total + p;
      p.store(weights + n);
    }
    const V correction = exp2(offset - V::set1(state_.previous[r]));
    offset.store(lanes);
    state_.previous[r] = lanes[0];
    correction.store(lanes);
    state_.correction[r] = lanes[0];
    state_.sum[r] = state_.sum[r] * lanes[0] + sum(total);
  }

  // The general way, through a tile of which only a few lanes are in use.
  void softmax_of_few(const Tile& tile) {
    for (int c = 0; c < map_.keys; ++c) V::zero().store(scores_ + c * kBlockQ);
    for (int n = 0; n < count_; ++n) {
      for (int r = 0; r < rows_; ++r) scores_[key_[n] * kBlockQ + r] = weights_[r][n];
    }
    apply_formula<Real>(tile, formula_, scores_, bias_, nullptr, state_.largest);
    uint64_t keep[kBlockK];
    const bool dropout = dropout_.active(), plain = formula_.plain;
    if (dropout) dropout_.draw(tile, keep);
    const auto run = dropout
                         ? (plain ? softmax_tile<E, true, true> : softmax_tile<E, false, true>)
                         : (plain ? softmax_tile<E, true, false> : softmax_tile<E, false, false>);
    run(map_, 1, formula_.log2_scale(), keep, scores_, scores_, state_);
    for (int n = 0; n < count_; ++n) {
      for (int r = 0; r < rows_; ++r) weights_[r][n] = scores_[key_[n] * kBlockQ + r];
    }
  }

  // acc[query] = correction acc[query] + the probabilities' sum of rows of V
  void accumulate_output() {
    for (int r = 0; r < rows_; ++r) {
      int64_t d = 0;
      for (; d + 8 * kLanes <= p_.head_dim_v; d += 8 * kLanes) add_rows<8, 1>(r, d, kLanes);
      for (; d + 4 * kLanes <= p_.head_dim_v; d += 4 * kLanes) add_rows<4, 2>(r, d, kLanes);
      for (; d < p_.head_dim_v; d += kLanes) {
        add_rows<1, 4>(r, d, static_cast<int>(smaller<int64_t>(p_.head_dim_v - d, kLanes)));
      }
    }
  }

  // N vectors of columns from d on, the last of `width` columns; Step keys have sums of their own
  // to hide the latency of the additions.
  template <int N, int Step>
  FUSED_ATTN_INLINE void add_rows(int r, int64_t d, int width) {
    V sum[Step][N];
    Real* acc = acc_ + r * width_v_ + d;
    const V correction = V::set1(state_.correction[r]);
    FUSED_ATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      sum[0][n] = V::load(acc + n * kLanes) * correction;
      FUSED_ATTN_UNROLL
      for (int s = 1; s < Step; ++s) sum[s][n] = V::zero();
    }
    auto add = [&](int key, V(&to)[N]) {
      const V p = V::set1(weights_[r][key]);
      const T* row = v_row_[key] + d;
      FUSED_ATTN_UNROLL
      for (int n = 0; n < N; ++n) {
        to[n] = fma(load_as<Real>(row + n * kLanes, N == 1 ? width : kLanes), p, to[n]);
      }
    };
    int key = 0;
    for (; key + Step <= count_; key += Step) {
      FUSED_ATTN_UNROLL
      for (int s = 0; s < Step; ++s) add(key + s, sum[s]);
    }
    for (; key < count_; ++key) add(key, sum[0]);
    FUSED_ATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      FUSED_ATTN_UNROLL
      for (int s = 1; s < Step; ++s) sum[0][n] = sum[0][n] + sum[s][n];
      sum[0][n].store(acc + n * kLanes);
    }
  }

  void write() {
    alignas(64) Real factor[kBlockQ];
    alignas(64) Real lse[kBlockQ];
    finish(state_, formula_, dropout_, rows_, factor, lse);
    const HeadView out = query_view(p_, p_.out, sequence_, head_, p_.head_dim_v);
    for (int r = 0; r < rows_; ++r) {
      write_rows(acc_ + r * width_v_, width_v_, factor[r], out, {r, r + 1});
    }
    if (p_.lse.data == nullptr) return;
    const HeadView view = query_view(p_, p_.lse, sequence_, head_, 1);
    for (int r = 0; r < rows_; ++r) *view.template row<Real>(r) = lse[r];
  }

  const Params& p_;
  const Sequence& sequence_;
  const int64_t head_;
  const int rows_;
  const Visibility visibility_;
  const ScoreFormula<Real> formula_;
  const Dropout dropout_;
  const HeadView k_;
  const HeadView v_;
  const int64_t width_;    // of a row of q_
  const int64_t width_v_;  // of a row of acc_
  const uint8_t* keep_ = nullptr;
  Real* q_;       // [query][column]
  Real* scores_;  // [key][query]
  Real* bias_ = nullptr;
  Real* acc_;  // [query][column]

  TileMap map_;
  int count_ = 0;     // of the keys that some query sees
  int key_[kBlockK];  // their positions in the tile
  const T* k_row_[kBlockK];
  const T* v_row_[kBlockK];
  alignas(64) Real weights_[kFewQueries][kBlockK];  // scores, then probabilities of those keys
  RunningSoftmax<Real> state_;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
