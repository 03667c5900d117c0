// The forward of one head, block of queries by block of queries.
#pragma once

#include "attention/cpu/head.h"
#include "attention/cpu/kept_probabilities.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

struct ForwardBuffers {
  HeadBuffers head;
  Buffer v, v_rows, v_turned, acc;
};

template <class E>
class ForwardHead {
  using Real = typename E::Real;
  using Unit = typename E::Unit;

 public:
  ForwardHead(const Params& p, const Sequence& sequence, int64_t head, ForwardBuffers& buffers)
      : p_(p), tile_(p, sequence, head, buffers.head) {
    if (!wants_out()) return;
    v_ = ColumnRows<E>(key_view(p, p.v, sequence, head, p.head_dim_v), tile_.visibility.keys(),
                       tile_.keep_keys, buffers.v, buffers.v_rows, buffers.v_turned);
    acc_ = buffers.acc.get<Real>(p.head_dim_v * kStrideQ);
  }

  // Queries [begin, end). `next` is the head that probably follows, or null.
  void run(int64_t begin, int64_t end, const HeadOf* next) {
    if (next != nullptr) {
      tile_.prefetch_head(
          *next,
          {tile_.keys_of(*next, p_.k, p_.head_dim), tile_.keys_of(*next, p_.v, p_.head_dim_v)},
          ceil_div(end - begin, kBlockQ));
    }
    for (int64_t i = begin; i < end; i += kBlockQ) {
      const int rows = static_cast<int>(smaller<int64_t>(end - i, kBlockQ));
      const KeyRange keys = tile_.visibility.keys(i, i + rows);
      const int64_t count = keys.end - keys.begin;
      tile_.prefetch_block(p_.out, p_.head_dim_v, i, end,
                           product_tiles<Real>(rows, count) +
                               ceil_div(count, kBlockK) * product_tiles<Real>(rows, p_.head_dim_v));
      block(i, rows);
    }
  }

  // Queries [i, i + rows), whose probabilities go to `kept` where it is not null.
  void block(int64_t i, int rows, KeptProbabilities<E>* kept = nullptr) {
    kept_ = kept;
    if (kept != nullptr) kept->reset(tile_.visibility.keys());
    tile_.select_queries(i, rows);
    state_.reset();
    fresh_ = true;
    tile_.for_each_tile(tile_.visibility.keys(i, i + rows), kBlockK, [&] {
      tile_.compute(state_.largest);
      compute_probabilities();
      if (wants_out()) accumulate_output();
      fresh_ = false;
    });
    write();
  }

  // sums[key][query] += what the block's probabilities came to, after dropout.
  void add_probabilities(const KeptProbabilities<E>& kept, Real* sums) const {
    kept.add_to(sums, state_.shift, tile_.formula, factor_);
  }

 private:
  bool wants_out() const { return p_.out.data != nullptr; }

  // The probabilities take the place of the scores unless they are kept, in units of the product
  // with V.
  Unit* probabilities() {
    return kept_ == nullptr ? reinterpret_cast<Unit*>(tile_.scores) : kept_->tile(tile_.j);
  }

  void compute_probabilities() {
    uint64_t keep[kBlockK];
    const bool dropout = tile_.dropout.active(), plain = tile_.formula.plain;
    if (dropout) tile_.dropout.draw(tile_.tile(), keep);
    const auto run = dropout
                         ? (plain ? softmax_tile<E, true, true> : softmax_tile<E, false, true>)
                         : (plain ? softmax_tile<E, true, false> : softmax_tile<E, false, false>);
    run(tile_.map, tile_.groups, tile_.formula.log2_scale(), keep, tile_.scores, probabilities(),
        state_);
    if (kept_ != nullptr) kept_->keep(tile_.j, tile_.map, state_.shift);
  }

  // acc = correction acc + V^T probabilities
  void accumulate_output() {
    const TileMap& map = tile_.map;
    const bool whole = map.whole(tile_.groups);
    if (!whole) correct_output();
    for (int s = 0; s < map.num_segments; ++s) {
      const Segment& segment = map.segments[s];
      const Product<E> product{v_.from(tile_.j + segment.begin),
                               v_.stride(),
                               probabilities() + segment.begin / E::kPair * kStrideQ,
                               kStrideQ,
                               acc_,
                               kStrideQ,
                               p_.head_dim_v,
                               units<E>(segment.end - segment.begin),
                               segment.group_begin,
                               segment.group_end};
      if (!whole) {
        multiply<E, kOfColumns<E>>(product, then_prefetch(Accumulate{}, tile_.prefetcher));
      } else if (fresh_) {
        multiply<E, kOfColumns<E>>(product, then_prefetch(Overwrite{}, tile_.prefetcher));
      } else {
        multiply<E, kOfColumns<E>>(
            product, then_prefetch(ScaleAndAccumulate<Real>{state_.correction}, tile_.prefetcher));
      }
    }
  }

  void correct_output() {
    using V = Vec<Real>;
    for (int64_t d = 0; d < p_.head_dim_v; ++d) {
      for (int q = 0; q < tile_.groups * kLanes; q += kLanes) {
        Real* acc = acc_ + d * kStrideQ + q;
        (fresh_ ? V::zero() : V::load(acc) * V::load(state_.correction + q)).store(acc);
      }
    }
  }

  void write() {
    alignas(64) Real lse[kBlockQ];
    finish(state_, tile_.formula, tile_.dropout, tile_.rows, factor_, lse);
    if (wants_out()) {
      if (fresh_) correct_output();
      write_columns(acc_, factor_, tile_.rows, tile_.queries(p_.out, p_.head_dim_v));
    }
    if (p_.lse.data == nullptr) return;
    const HeadView view = tile_.queries(p_.lse, 1);
    for (int q = 0; q < tile_.rows; ++q) *view.row<Real>(q) = lse[q];
  }

  const Params& p_;
  HeadScores<E> tile_;
  ColumnRows<E> v_;
  Real* acc_;          // [column of v][query]
  bool fresh_ = true;  // nothing accumulated yet
  RunningSoftmax<Real> state_;
  alignas(64) Real factor_[kBlockQ];  // see finish()
  KeptProbabilities<E>* kept_ = nullptr;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
