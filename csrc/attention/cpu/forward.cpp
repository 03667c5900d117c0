// Forward attention on the CPU: out = softmax(scores) v, block of queries by block of queries, with
// the running softmax over tiles of keys. Compiled once per instruction-set level.
#include "attention/cpu/decode.h"
#include "attention/cpu/dispatch.h"
#include "attention/cpu/forward_head.h"
#include "attention/cpu/kernels.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {
namespace {

struct Scratch {
  ForwardBuffers head;
  DecodeBuffers decode;
};

Scratch& scratch() {
  static thread_local Scratch buffers;
  return buffers;
}

// Decoding with split keys: a task is a pass over the keys, or a part of the keys of one.
template <class F>
class SplitKeys {
  using Real = typename F::Number;

 public:
  SplitKeys(const Params& p, int threads)
      : p_(p),
        threads_(threads),
        passes_(ceil_div(p.num_heads / p.num_heads_kv,
                         heads_together(p, smaller<int64_t>(p.seqlen_q, kDecodeRows)))),
        tasks_(p.batch * p.num_heads_kv * passes_) {}

  void run() const {
    const int64_t wanted = threads_ == 1 ? 1 : ceil_div(kTasksPerThread * threads_, tasks_);
    const int64_t parts = larger<int64_t>(1, smaller(wanted, p_.seqlen_k / kMinPart));
    last_decode_parts = parts;
    if (parts == 1) {
      parallel_for(threads_, tasks_, [&](int64_t t) {
        pass(t, [](F& decode) {
          decode.run(0, 1);
          decode.write();
        });
      });
      return;
    }
    static thread_local Buffer buffer;
    const int64_t size = F::record_size(p_);
    Real* records = buffer.get<Real>(tasks_ * parts * size);
    parallel_for(threads_, tasks_ * parts, [&](int64_t t) {
      pass(t / parts, [&](F& decode) {
        decode.run(t % parts, parts);
        decode.save(records + t * size);
      });
    });
    parallel_for(threads_, tasks_, [&](int64_t t) {
      pass(t, [&](F& decode) {
        for (int64_t part = 0; part < parts; ++part)
          decode.merge(records + (t * parts + part) * size);
        decode.write();
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
    if (sequence.seqlen_q > kDecodeRows) return;
    const int64_t group = p_.num_heads / p_.num_heads_kv;
    const int64_t together = heads_together(p_, sequence.seqlen_q);
    const int64_t first = t % passes_ * together;
    if (first >= group) return;
    const int64_t head = t / passes_ % p_.num_heads_kv * group + first;
    F decode(p_, {sequence, head, static_cast<int>(smaller(together, group - first))},
             scratch().decode);
    call(decode);
  }

  const Params& p_;
  const int threads_;
  const int64_t passes_;  // over the keys of one kv head
  const int64_t tasks_;
};

// The engine does not matter where memory is the limit, so 16-bit types are all converted.
template <class T>
using DecodeOf = DecodePass<std::conditional_t<sizeof(T) == 8, EngineF64, EngineF32>, T>;

// Calls call(F) with the type that decodes in this dtype.
template <class E, class Call>
void with_decode_pass(const Params& p, const Call& call) {
  with_dtype<typename E::Real>(p.dtype, [&](auto* tag) {
    call(static_cast<DecodeOf<std::remove_pointer_t<decltype(tag)>>*>(nullptr));
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
    // Functions of pairs know tiles of queries in lanes only.
    const int64_t decoded = p.functions == nullptr ? kDecodeRows : 0;
    if (p.seqlen_q <= decoded || p.cu_seqlens_q != nullptr) {
      with_decode_pass<E>(p, [&](auto* type) {
        SplitKeys<std::remove_pointer_t<decltype(type)>>(p, threads).run();
      });
    }
    if (p.seqlen_q <= decoded) return;
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
      if (head.sequence.seqlen_q <= decoded) return;
      const int64_t end = smaller(head.sequence.seqlen_q, (part + 1) * blocks / parts * kBlockQ);
      const int64_t begin = part * blocks / parts * kBlockQ;
      if (begin >= end) return;
      // Threads take turns, more or less.
      const int64_t following = (task + threads) / parts;
      const HeadOf next = head_of(smaller(following, heads - 1));
      ForwardHead<E>(p, head.sequence, head.head, scratch().head)
          .run(begin, end, following < heads ? &next : nullptr);
    });
  });
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
