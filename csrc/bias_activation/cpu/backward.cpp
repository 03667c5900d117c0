// Gradients of y = dropout(act(x + bias)) and of its gated form, with everything computed again:
//
//   g = dy where y was kept, times 1 / (1 - p)
//   dx = g * act'(x + bias)
//   gated: dgate = g * (up + bias_up) * act'(gate + bias_gate),  dup = g * act(gate + bias_gate)
//   dbias = sum over rows of dx, before it is rounded
#include "bias_activation/params.h"
#include "cpu/activation.h"
#include "cpu/row_dropout.h"
#include "cpu/row_sums.h"

namespace fused_attn::bias_activation::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

template <class T>
struct Row {
  const T* dy;
  const T* x;        // the gates if gated, and then what they are multiplied by
  const Mask* keep;  // of the dropout, or null
  T* dx;
};

template <class T, Activation kActivation, bool kGated>
class Backward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  Backward(const BackwardParams& p, const A* bias)
      : p_(p), bias_(bias), dy_(p.dy, p.width), x_(p.x, p.width_in()), dx_(p.dx, p.width_in()) {
    const bool large = p.rows * p.width_in() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    // The second half of a row must be aligned as well.
    const bool halves = !kGated || p.width * static_cast<int64_t>(sizeof(T)) % 64 == 0;
    stream_ = large && halves && dx_.aligned();
  }

  // Adds the bias's gradient of these rows to dbias (width_in elements).
  void run(int64_t begin, int64_t end, A* dbias) const {
    static thread_local Buffer buffer;
    A* group = buffer.get<A>(p_.width_in());
    for (int64_t first = begin; first < end; first += kGroupRows) {
      std::fill_n(group, p_.width_in(), A(0));
      run_group(first, std::min(end, first + kGroupRows), group);
      add_to(dbias, group, p_.width_in());
    }
  }

 private:
  void run_group(int64_t begin, int64_t end, A* dbias) const {
    const int64_t masks = Dropout::masks(p_.width);
    static thread_local Buffer buffers[4];
    T* scratch_dy = buffers[0].get<T>(kBlockRows * dy_.scratch_size());
    T* scratch_x = buffers[1].get<T>(kBlockRows * x_.scratch_size());
    T* scratch_dx = buffers[2].get<T>(kBlockRows * dx_.scratch_size());
    Mask* keep = buffers[3].get<Mask>(kBlockRows * masks);
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - first));
      Row<T> rows[kBlockRows];
      for (int r = 0; r < count; ++r) {
        const int64_t i = first + r;
        rows[r].dy = dy_.get(i, scratch_dy + r * dy_.scratch_size());
        rows[r].x = x_.get(i, scratch_x + r * x_.scratch_size());
        rows[r].dx = dx_.get(i, scratch_dx + r * dx_.scratch_size());
        rows[r].keep = p_.rng == nullptr ? nullptr : keep + r * masks;
        if (p_.rng != nullptr) {
          Dropout(p_.rng, p_.dropout_p).draw(i, p_.width, keep + r * masks);
        }
      }
      gradients(rows, count, dbias);
      for (int r = 0; r < count; ++r) dx_.put(first + r, rows[r].dx);
    }
    if (stream_) stream_fence();
  }

  void gradients(const Row<T>* rows, int count, A* dbias) const {
    const bool streamed = stream_;
    const int64_t width = p_.width;
    const A* bias = bias_;
    const V factor =
        V::set1(p_.rng == nullptr ? A(1) : static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
    for_columns(width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
      const V b = load(bias + j, lanes);
      const V b_up = kGated ? load(bias + width + j, lanes) : V::zero();
      V db = V::zero(), db_up = V::zero();
      for (int r = 0; r < count; ++r) {
        const Row<T>& row = rows[r];
        V dx = load(row.dy + j, lanes);
        if (row.keep != nullptr) dx = select(row.keep[j / kLanes], dx * factor, V::zero());
        const Slope<A> at =
            activate_with_slope<kActivation, kPrecisionOf<T>>(load(row.x + j, lanes) + b);
        if constexpr (kGated) {
          const V dup = dx * at.value;
          dx = dx * (load(row.x + width + j, lanes) + b_up);
          put(row.dx + width + j, dup, lanes, streamed);
          db_up = db_up + dup;
        }
        dx = dx * at.slope;
        put(row.dx + j, dx, lanes, streamed);
        db = db + dx;
      }
      put(dbias + j, load(dbias + j, lanes) + db, lanes, false);
      if constexpr (kGated) {
        put(dbias + width + j, load(dbias + width + j, lanes) + db_up, lanes, false);
      }
    });
  }

  const BackwardParams& p_;
  const A* bias_;
  Reader<T> dy_, x_;
  Writer<T> dx_;
  bool stream_ = false;
};

template <class T, Activation kActivation, bool kGated>
void backward_as(const BackwardParams& p) {
  using A = Compute<T>;
  static thread_local Buffer bias_buffer, sums_buffer;
  const A* bias = parameter_row<A>(p.bias, p.width_in(), A(0), bias_buffer);
  const Backward<T, kActivation, kGated> kernel(p, bias);
  const int threads = threads_for(p.rows, p.width, p.threads);
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(blocks, threads));
  // Whole cache lines for each task, and none shared.
  const int64_t stride = (p.width_in() + 63) / 64 * 64;
  A* sums = sums_buffer.get<A>(tasks * stride);
  parallel_for(threads, tasks, [&](int64_t t) {
    A* dbias = sums + t * stride;
    std::fill_n(dbias, stride, A(0));
    kernel.run(blocks * t / tasks * kBlockRows,
               std::min(p.rows, blocks * (t + 1) / tasks * kBlockRows), dbias);
  });
  write_parameter_gradient(p.dbias, p.width_in(), sums, tasks, stride);
}

}  // namespace

void backward(const BackwardParams& p) {
  if (p.width == 0) return;
  with_problem_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_activation(p.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      p.gated ? backward_as<T, kActivation, true>(p) : backward_as<T, kActivation, false>(p);
    });
  });
}

}  // namespace fused_attn::bias_activation::FUSED_ATTN_LEVEL
