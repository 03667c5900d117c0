// Forward attention on the CPU: out = softmax(scores) v, block of queries by block of queries, with
// the running softmax over tiles of keys. Compiled once per instruction-set level.
#include <type_traits>

#include "attention/cpu_kernels.h"
#include "attention/gemm.h"
#include "attention/softmax.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

struct Scratch {
  Buffer keep, k, v, row, q_rows, q, scores, bias, acc;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

// One head: its keys and values are prepared once, then blocks of queries run over them.
template <class E>
class ForwardHead {
  using Real = typename E::Real;
  using Unit = typename E::Unit;

 public:
  ForwardHead(const Params& p, const Sequence& sequence, int64_t head)
      : p_(p),
        sequence_(sequence),
        head_(head),
        visibility_(p, sequence, head),
        formula_(p),
        dropout_(p),
        units_(units<E>(p.head_dim)) {
    Scratch& s = scratch();
    const KeyRange range = visibility_.keys();
    const uint8_t* keep = keys_to_keep(p, sequence, head, visibility_, s.keep);
    const HeadView k = key_view(p, p.k, sequence, head, p.head_dim);
    const HeadView v = key_view(p, p.v, sequence, head, p.head_dim_v);
    k_ = prepare_rows<E>(k, range, keep, s.k);
    v_ = prepare_pairs<E>(v, range, keep, p.head_dim_v, s.v, s.row);
    q_ = s.q.get<Unit>(units_ * kBlockQ);
    scores_ = s.scores.get<Real>(kBlockK * kBlockQ);
    bias_ = p.bias.data == nullptr ? nullptr : s.bias.get<Real>(kBlockK * kBlockQ);
    acc_ = s.acc.get<Real>(p.head_dim_v * kBlockQ);
  }

  // Queries [i, i + rows).
  void block(int64_t i, int rows) {
    i_ = i;
    rows_ = rows;
    groups_ = static_cast<int>(ceil_div(rows, kLanes));
    load_q();
    state_.reset(formula_.plain, formula_.log2_scale());
    fresh_ = true;
    const KeyRange range = visibility_.keys(i, i + rows);
    for (int64_t j = range.begin / E::kPair * E::kPair; j < range.end; j += kBlockK) {
      visibility_.tile(i, rows, j, static_cast<int>(smaller<int64_t>(range.end - j, kBlockK)),
                       map_);
      if (map_.seen == Seen::kNone) continue;
      compute_scores(j);
      compute_probabilities(j);
      accumulate_output(j);
      fresh_ = false;
    }
    write();
  }

 private:
  void load_q() {
    const HeadView q = query_view(p_, p_.q, sequence_, head_, p_.head_dim);
    const Rows<E> rows = prepare_rows<E>({q.view, q.batch, q.head, q.first + i_, q.columns},
                                         {0, rows_}, nullptr, scratch().q_rows);
    pack_columns<E>(rows, rows_, units_, q_);
  }

  // scores = K Q^T and the largest score of each query.
  void compute_scores(int64_t j) {
    const bool fold_max = formula_.plain && map_.seen == Seen::kAll;
    for (int s = 0; s < map_.num_segments; ++s) {
      const Segment& segment = map_.segments[s];
      const Product<E> product{k_.row(j + segment.begin),
                               k_.stride,
                               q_,
                               kBlockQ,
                               scores_ + segment.begin * kBlockQ,
                               kBlockQ,
                               segment.end - segment.begin,
                               units_,
                               segment.group_begin,
                               segment.group_end};
      if (fold_max) {
        multiply<E, Form::kRows>(product, OverwriteAndMax<Real>{state_.largest});
      } else {
        multiply<E, Form::kRows>(product, Overwrite{});
      }
    }
    if (!fold_max) {
      apply_formula<Real>({p_, sequence_, head_, i_, rows_, j, map_}, formula_, scores_, bias_,
                          nullptr, state_.largest);
    }
  }

  void compute_probabilities(int64_t j) {
    uint64_t keep[kBlockK];
    if (dropout_.active()) dropout_.draw({p_, sequence_, head_, i_, rows_, j, map_}, keep);
    auto run = [&](auto plain, auto dropout) {
      softmax_tile<E, plain.value, dropout.value>(map_, groups_, formula_.log2_scale(), keep,
                                                  scores_, probabilities(), state_);
    };
    if (dropout_.active()) {
      formula_.plain ? run(std::true_type{}, std::true_type{})
                     : run(std::false_type{}, std::true_type{});
    } else {
      formula_.plain ? run(std::true_type{}, std::false_type{})
                     : run(std::false_type{}, std::false_type{});
    }
  }

  // acc = correction acc + V^T probabilities
  void accumulate_output(int64_t j) {
    const bool whole = map_.whole(groups_);
    if (!whole) correct_output();
    for (int s = 0; s < map_.num_segments; ++s) {
      const Segment& segment = map_.segments[s];
      const Product<E> product{v_.row((j + segment.begin) / E::kPair),
                               v_.stride,
                               probabilities() + segment.begin / E::kPair * kBlockQ,
                               kBlockQ,
                               acc_,
                               kBlockQ,
                               p_.head_dim_v,
                               units<E>(segment.end - segment.begin),
                               segment.group_begin,
                               segment.group_end};
      if (!whole) {
        multiply<E, Form::kColumns>(product, Accumulate{});
      } else if (fresh_) {
        multiply<E, Form::kColumns>(product, Overwrite{});
      } else {
        multiply<E, Form::kColumns>(product, ScaleAndAccumulate<Real>{state_.correction});
      }
    }
  }

  void correct_output() {
    using V = Vec<Real>;
    for (int64_t d = 0; d < p_.head_dim_v; ++d) {
      for (int q = 0; q < groups_ * kLanes; q += kLanes) {
        Real* acc = acc_ + d * kBlockQ + q;
        (fresh_ ? V::zero() : V::load(acc) * V::load(state_.correction + q)).store(acc);
      }
    }
  }

  void write() {
    alignas(64) Real factor[kBlockQ];
    alignas(64) Real lse[kBlockQ];
    const Real drop = static_cast<Real>(dropout_.factor());
    const Real scale = formula_.plain ? formula_.scale : Real(1);
    for (int q = 0; q < rows_; ++q) {
      const bool hidden = formula_.plain && state_.largest[q] <= hidden_score<Real>(true);
      const Real sum = hidden ? Real(0) : state_.sum[q];
      // Not `sum > 0`: a NaN must reach the output.
      factor[q] = sum == 0 ? Real(0) : drop / sum;
      lse[q] = sum == 0 ? -std::numeric_limits<Real>::infinity()
                        : state_.largest[q] * scale + std::log(sum);
    }
    for (int q = rows_; q < groups_ * kLanes; ++q) factor[q] = 0;
    if (fresh_) correct_output();
    write_columns(acc_, factor, rows_, query_view(p_, p_.out, sequence_, head_, p_.head_dim_v), i_);
    if (p_.lse.data == nullptr) return;
    const HeadView view = query_view(p_, p_.lse, sequence_, head_, 1);
    for (int q = 0; q < rows_; ++q) *view.row<Real>(i_ + q) = lse[q];
  }

  Unit* probabilities() { return reinterpret_cast<Unit*>(scores_); }

  const Params& p_;
  const Sequence sequence_;
  const int64_t head_;
  const Visibility visibility_;
  const ScoreFormula<Real> formula_;
  const Dropout dropout_;
  const int64_t units_;  // of head_dim
  Rows<E> k_;
  Rows<E> v_;
  Unit* q_;       // [unit][query]
  Real* scores_;  // [key][query]; then the probabilities, in units
  Real* bias_;
  Real* acc_;  // [column of v][query]

  int64_t i_ = 0;
  int rows_ = 0;
  int groups_ = 0;
  bool fresh_ = true;  // nothing accumulated yet
  TileMap map_;
  RunningSoftmax<Real> state_;
};

}  // namespace

void forward(const Params& p) {
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    const int threads = useful_threads(p, 4);
    const int64_t heads = p.batch * p.num_heads;
    const int64_t blocks = ceil_div(p.seqlen_q, kBlockQ);
    if (heads == 0 || blocks == 0) return;
    // Several tasks per thread even out causal problems; a whole head per task saves preparing its
    // keys more than once.
    const int64_t parts =
        threads == 1 ? 1 : larger<int64_t>(1, smaller(blocks, 8 * threads / heads));
    parallel_for(threads, heads * parts, [&](int64_t task) {
      const int64_t head = task / parts;
      const int64_t part = parts - 1 - task % parts;  // the longest first
      const Sequence sequence(p, head / p.num_heads);
      const int64_t end = smaller(sequence.seqlen_q, (part + 1) * blocks / parts * kBlockQ);
      int64_t i = part * blocks / parts * kBlockQ;
      if (i >= end) return;
      ForwardHead<E> work(p, sequence, head % p.num_heads);
      for (; i < end; i += kBlockQ) {
        work.block(i, static_cast<int>(smaller<int64_t>(end - i, kBlockQ)));
      }
    });
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
