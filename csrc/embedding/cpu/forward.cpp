// y[i] = dropout(scale * weight[tokens[i]] + table[position of i]), one token after the other.
#include "cpu/row_dropout.h"
#include "cpu/rows.h"
#include "embedding/params.h"

namespace fused_attn::embedding::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

template <class T>
class Forward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  explicit Forward(const Params& p)
      : p_(p), weight_(p.weight, p.width), table_(p.table, p.width), y_(p.y, p.width) {
    stream_ = p.rows * p.width * static_cast<int64_t>(sizeof(T)) > kStreamBytes && y_.aligned();
  }

  void run(int64_t begin, int64_t end) const {
    static thread_local Buffer buffers[4];
    T* scratch_weight = buffers[0].get<T>(weight_.scratch_size());
    T* scratch_table = buffers[1].get<T>(table_.scratch_size());
    T* scratch_y = buffers[2].get<T>(y_.scratch_size());
    Mask* keep = buffers[3].get<Mask>(Dropout::masks(p_.width));
    for (int64_t i = begin; i < end; ++i) {
      if (p_.rng != nullptr) Dropout(p_.rng, p_.dropout_p).draw(i, p_.width, keep);
      const T* weight = weight_.get(p_.tokens[i], scratch_weight);
      const T* table = table_.absent() ? nullptr : table_.get(position(i), scratch_table);
      T* y = y_.get(i, scratch_y);
      add_row(weight, table, p_.rng == nullptr ? nullptr : keep, y);
      y_.put(i, y);
    }
    if (stream_) stream_fence();
  }

 private:
  int64_t position(int64_t i) const {
    return p_.positions == nullptr ? p_.offset + i % p_.length : p_.positions[i];
  }

  void add_row(const T* weight, const T* table, const Mask* keep, T* y) const {
    const bool streamed = stream_;
    const V scale = V::set1(static_cast<A>(p_.scale));
    const V factor =
        V::set1(keep == nullptr ? A(1) : static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
    for_columns(p_.width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
      V v = load(weight + j, lanes) * scale;
      if (table != nullptr) v = v + load(table + j, lanes);
      if (keep != nullptr) v = select(keep[j / kLanes], v * factor, V::zero());
      put(y + j, v, lanes, streamed);
    });
  }

  const Params& p_;
  Reader<T> weight_, table_;
  Writer<T> y_;
  bool stream_ = false;
};

// Tasks for each thread: more than one, so that a thread which is held up delays little.
constexpr int64_t kTasksPerThread = 4;

template <class T>
void forward_as(const Params& p) {
  const Forward<T> kernel(p);
  const int threads = threads_for(p.rows, p.width, p.threads);
  const int64_t tasks = threads == 1 ? 1 : std::min<int64_t>(p.rows, threads * kTasksPerThread);
  parallel_for(threads, tasks,
               [&](int64_t t) { kernel.run(p.rows * t / tasks, p.rows * (t + 1) / tasks); });
}

}  // namespace

void forward(const Params& p) {
  if (p.rows == 0 || p.width == 0) return;
  with_problem_type(p.dtype,
                    [&](auto* type) { forward_as<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace fused_attn::embedding::FUSED_ATTN_LEVEL
