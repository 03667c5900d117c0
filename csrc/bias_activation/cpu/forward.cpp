// y = dropout(act(x + bias)) and its gated form, one row after the other.
#include "bias_activation/params.h"
#include "cpu/activation.h"
#include "cpu/row_dropout.h"
#include "cpu/rows.h"

namespace fused_attn::bias_activation::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

// The operands of one row; `up` and `keep` are null if absent.
template <class T>
struct Row {
  const T* x;  // the gates if gated
  const T* up;
  const Mask* keep;  // of the dropout
  T* y;
};

template <class T, Activation kActivation>
class Forward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  Forward(const Params& p, const A* bias)
      : p_(p), bias_(bias), x_(p.x, p.width_in()), y_(p.y, p.width) {
    const bool large = p.rows * p.width * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    // Memory that was just read is in the cache: there is nothing to gain by going past it.
    stream_ = large && y_.aligned() && p.y.data != p.x.data;
  }

  void run(int64_t begin, int64_t end) const {
    static thread_local Buffer buffers[3];
    T* scratch_x = buffers[0].get<T>(x_.scratch_size());
    T* scratch_y = buffers[1].get<T>(y_.scratch_size());
    Mask* keep = buffers[2].get<Mask>(Dropout::masks(p_.width));
    for (int64_t i = begin; i < end; ++i) {
      Row<T> row;
      row.x = x_.get(i, scratch_x);
      row.up = p_.gated ? row.x + p_.width : nullptr;
      row.keep = p_.rng == nullptr ? nullptr : keep;
      row.y = y_.get(i, scratch_y);
      if (p_.rng != nullptr) Dropout(p_.rng, p_.dropout_p).draw(i, p_.width, keep);
      activate_row(row);
      y_.put(i, row.y);
    }
    if (stream_) stream_fence();
  }

 private:
  void activate_row(const Row<T>& row) const {
    const bool streamed = stream_;
    const A *bias = bias_, *bias_up = bias_ + p_.width;
    const T *x = row.x, *up = row.up;
    const Mask* keep = row.keep;
    T* y = row.y;
    const V factor =
        V::set1(keep == nullptr ? A(1) : static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
    for_columns(p_.width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
      V v = activate<kActivation, kPrecisionOf<T>>(load(x + j, lanes) + load(bias + j, lanes));
      if (up != nullptr) v = v * (load(up + j, lanes) + load(bias_up + j, lanes));
      if (keep != nullptr) v = select(keep[j / kLanes], v * factor, V::zero());
      put(y + j, v, lanes, streamed);
    });
  }

  const Params& p_;
  const A* bias_;
  Reader<T> x_;
  Writer<T> y_;
  bool stream_ = false;
};

// Tasks for each thread: more than one, so that a thread which is held up delays little.
constexpr int64_t kTasksPerThread = 4;

template <class T, Activation kActivation>
void forward_as(const Params& p) {
  using A = Compute<T>;
  static thread_local Buffer buffer;
  const A* bias = parameter_row<A>(p.bias, p.width_in(), A(0), buffer);
  const Forward<T, kActivation> kernel(p, bias);
  const int threads = threads_for(p.rows, p.width, p.threads);
  const int64_t tasks = threads == 1 ? 1 : std::min<int64_t>(p.rows, threads * kTasksPerThread);
  parallel_for(threads, tasks,
               [&](int64_t t) { kernel.run(p.rows * t / tasks, p.rows * (t + 1) / tasks); });
}

}  // namespace

void forward(const Params& p) {
  if (p.rows == 0 || p.width == 0) return;
  with_problem_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_activation(p.activation,
                    [&](auto constant) { forward_as<T, decltype(constant)::value>(p); });
  });
}

}  // namespace fused_attn::bias_activation::FUSED_ATTN_LEVEL
