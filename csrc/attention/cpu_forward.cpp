// Forward attention on the CPU: out = softmax(scores) v, block of queries by block of queries, with
// the running softmax over tiles of keys. Compiled once per instruction-set level.
#include "attention/cpu_kernels.h"
#include "attention/few_queries.h"
#include "attention/head.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

struct Scratch {
  HeadBuffers head;
  FewBuffers few;
  Buffer v, v_rows, acc;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

template <class E>
class ForwardHead {
  using Real = typename E::Real;
  using Unit = typename E::Unit;

 public:
  ForwardHead(const Params& p, const Sequence& sequence, int64_t head)
      : p_(p), tile_(p, sequence, head, scratch().head, true) {
    Scratch& s = scratch();
    v_ = prepare_pairs<E>(key_view(p, p.v, sequence, head, p.head_dim_v), tile_.visibility.keys(),
                          tile_.keep_keys, p.head_dim_v, s.v, s.v_rows);
    acc_ = s.acc.get<Real>(p.head_dim_v * kBlockQ);
  }

  // Queries [begin, end). `next` is the head that probably follows, or null.
  void run(int64_t begin, int64_t end, const HeadOf* next) {
    if (next != nullptr) {
      tile_.ask_for_head(
          *next,
          {tile_.keys_of(*next, p_.k, p_.head_dim), tile_.keys_of(*next, p_.v, p_.head_dim_v)},
          ceil_div(end - begin, kBlockQ));
    }
    for (int64_t i = begin; i < end; i += kBlockQ) {
      const int rows = static_cast<int>(smaller<int64_t>(end - i, kBlockQ));
      const KeyRange keys = tile_.visibility.keys(i, i + rows);
      const int64_t count = keys.end - keys.begin;
      tile_.ask_for_block(p_.out, p_.head_dim_v, i, end,
                          product_tiles<Real>(rows, count) +
                              ceil_div(count, kBlockK) * product_tiles<Real>(rows, p_.head_dim_v));
      block(i, rows);
    }
  }

 private:
  // Queries [i, i + rows).
  void block(int64_t i, int rows) {
    tile_.select_queries(i, rows);
    state_.reset(tile_.formula.plain, tile_.formula.log2_scale());
    fresh_ = true;
    tile_.for_each_tile(tile_.visibility.keys(i, i + rows), kBlockK, [&] {
      tile_.compute(state_.largest);
      compute_probabilities();
      accumulate_output();
      fresh_ = false;
    });
    write();
  }

  // The probabilities take the place of the scores, in units of the product with V.
  Unit* probabilities() { return reinterpret_cast<Unit*>(tile_.scores); }

  void compute_probabilities() {
    uint64_t keep[kBlockK];
    const bool dropout = tile_.dropout.active(), plain = tile_.formula.plain;
    if (dropout) tile_.dropout.draw(tile_.tile(), keep);
    const auto run = dropout
                         ? (plain ? softmax_tile<E, true, true> : softmax_tile<E, false, true>)
                         : (plain ? softmax_tile<E, true, false> : softmax_tile<E, false, false>);
    run(tile_.map, tile_.groups, tile_.formula.log2_scale(), keep, tile_.scores, probabilities(),
        state_);
  }

  // acc = correction acc + V^T probabilities
  void accumulate_output() {
    const TileMap& map = tile_.map;
    const bool whole = map.whole(tile_.groups);
    if (!whole) correct_output();
    for (int s = 0; s < map.num_segments; ++s) {
      const Segment& segment = map.segments[s];
      const Product<E> product{v_.row((tile_.j + segment.begin) / E::kPair),
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
        multiply<E, Form::kColumns>(product, then_ask(Accumulate{}, tile_.ahead));
      } else if (fresh_) {
        multiply<E, Form::kColumns>(product, then_ask(Overwrite{}, tile_.ahead));
      } else {
        multiply<E, Form::kColumns>(
            product, then_ask(ScaleAndAccumulate<Real>{state_.correction}, tile_.ahead));
      }
    }
  }

  void correct_output() {
    using V = Vec<Real>;
    for (int64_t d = 0; d < p_.head_dim_v; ++d) {
      for (int q = 0; q < tile_.groups * kLanes; q += kLanes) {
        Real* acc = acc_ + d * kBlockQ + q;
        (fresh_ ? V::zero() : V::load(acc) * V::load(state_.correction + q)).store(acc);
      }
    }
  }

  void write() {
    alignas(64) Real factor[kBlockQ];
    alignas(64) Real lse[kBlockQ];
    finish(state_, tile_.formula, tile_.dropout, tile_.rows, factor, lse);
    if (fresh_) correct_output();
    write_columns(acc_, factor, tile_.rows, tile_.queries(p_.out, p_.head_dim_v));
    if (p_.lse.data == nullptr) return;
    const HeadView view = tile_.queries(p_.lse, 1);
    for (int q = 0; q < tile_.rows; ++q) *view.row<Real>(q) = lse[q];
  }

  const Params& p_;
  HeadScores<E> tile_;
  Rows<E> v_;
  Real* acc_;          // [column of v][query]
  bool fresh_ = true;  // nothing accumulated yet
  RunningSoftmax<Real> state_;
};

// Sequences of few queries: a task is a pass over the keys, or a part of the keys of one.
template <class F>
class ForwardFew {
  using Real = typename F::Number;

 public:
  ForwardFew(const Params& p, int threads)
      : p_(p),
        threads_(threads),
        passes_(ceil_div(p.num_heads / p.num_heads_kv,
                         heads_together(p, smaller<int64_t>(p.seqlen_q, kFewRows)))),
        tasks_(p.batch * p.num_heads_kv * passes_) {}

  void run() const {
    const int64_t wanted = threads_ == 1 ? 1 : ceil_div(kTasksPerThread * threads_, tasks_);
    const int64_t parts = larger<int64_t>(1, smaller(wanted, p_.seqlen_k / kMinPart));
    if (parts == 1) {
      parallel_for(threads_, tasks_, [&](int64_t t) {
        pass(t, [](F& few) {
          few.run(0, 1);
          few.write();
        });
      });
      return;
    }
    static thread_local Buffer buffer;
    const int64_t size = F::record_size(p_);
    Real* records = buffer.get<Real>(tasks_ * parts * size);
    parallel_for(threads_, tasks_ * parts, [&](int64_t t) {
      pass(t / parts, [&](F& few) {
        few.run(t % parts, parts);
        few.save(records + t * size);
      });
    });
    parallel_for(threads_, tasks_, [&](int64_t t) {
      pass(t, [&](F& few) {
        for (int64_t part = 0; part < parts; ++part) few.merge(records + (t * parts + part) * size);
        few.write();
      });
    });
  }

 private:
  static constexpr int64_t kTasksPerThread = 4;  // evens out what threads have to do
  static constexpr int64_t kMinPart = 512;       // keys that are worth a task

  // Calls call(F&) for pass `t`, if there is such a pass in its sequence.
  template <class Call>
  void pass(int64_t t, const Call& call) const {
    const Sequence sequence(p_, t / passes_ / p_.num_heads_kv);
    if (sequence.seqlen_q > kFewRows) return;
    const int64_t group = p_.num_heads / p_.num_heads_kv;
    const int64_t together = heads_together(p_, sequence.seqlen_q);
    const int64_t first = t % passes_ * together;
    if (first >= group) return;
    const int64_t head = t / passes_ % p_.num_heads_kv * group + first;
    F few(p_, {sequence, head, static_cast<int>(smaller(together, group - first))}, scratch().few);
    call(few);
  }

  const Params& p_;
  const int threads_;
  const int64_t passes_;  // over the keys of one kv head
  const int64_t tasks_;
};

// The engine does not matter where memory is the limit, so 16-bit types are all converted.
template <class T>
using Few = FewQueries<std::conditional_t<sizeof(T) == 8, EngineF64, EngineF32>, T>;

// Calls call(F) with the type that computes sequences of few queries in this dtype.
template <class E, class Call>
void with_few(const Params& p, const Call& call) {
  with_dtype<typename E::Real>(p.dtype, [&](auto* tag) {
    call(static_cast<Few<std::remove_pointer_t<decltype(tag)>>*>(nullptr));
  });
}

}  // namespace

void forward(const Params& p) {
  with_engine(p.dtype, [&](auto engine) {
    using E = decltype(engine);
    const int threads = useful_threads(p, 4);
    const int64_t heads = p.batch * p.num_heads;
    const int64_t blocks = ceil_div(p.seqlen_q, kBlockQ);
    if (heads == 0 || blocks == 0) return;
    if (p.seqlen_q <= kFewRows || p.cu_seqlens_q != nullptr) {
      with_few<E>(p, [&](auto* type) {
        ForwardFew<std::remove_pointer_t<decltype(type)>>(p, threads).run();
      });
    }
    if (p.seqlen_q <= kFewRows) return;
    // Several tasks per thread even out causal problems; a whole head per task saves preparing its
    // keys more than once.
    const int64_t parts =
        threads == 1 ? 1 : larger<int64_t>(1, smaller(blocks, 8 * threads / heads));
    parallel_for(threads, heads * parts, [&](int64_t task) {
      const auto head_of = [&](int64_t n) {
        return HeadOf{Sequence(p, n / p.num_heads), n % p.num_heads};
      };
      const HeadOf head = head_of(task / parts);
      const int64_t part = parts - 1 - task % parts;  // the longest first
      if (head.sequence.seqlen_q <= kFewRows) return;
      const int64_t end = smaller(head.sequence.seqlen_q, (part + 1) * blocks / parts * kBlockQ);
      const int64_t begin = part * blocks / parts * kBlockQ;
      if (begin >= end) return;
      // Threads take turns, more or less.
      const int64_t following = (task + threads) / parts;
      const HeadOf next = head_of(smaller(following, heads - 1));
      ForwardHead<E>(p, head.sequence, head.head)
          .run(begin, end, following < heads ? &next : nullptr);
    });
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
