// h = dropout(x) + residual and y = norm(h) * weight + bias, one row after the other. A row is read
// from memory once: it stays in a buffer in the first cache for the variance and the output.
#include <cmath>
#include <limits>

#include "cpu/row_dropout.h"
#include "cpu/rows.h"
#include "layer_norm/params.h"

namespace fused_attn::layer_norm::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

template <class V>
FUSED_ATTN_INLINE V first(const V& v, AllLanes) {
  return v;
}
template <class V>
FUSED_ATTN_INLINE V first(const V& v, SomeLanes lanes) {
  return select(static_cast<Mask>((1u << lanes.count) - 1u), v, V::zero());
}

// The operands of one row; those that are absent are null.
template <class T>
struct Row {
  const T* x;
  const T* residual;
  const Mask* keep;  // of the dropout
  T* h;
  T* y;
};

template <class T>
class Forward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  Forward(const Params& p, const A* weight, const A* bias)
      : p_(p),
        weight_(weight),
        bias_(bias),
        x_(p.x, p.width),
        residual_(p.residual, p.width),
        y_(p.y, p.width),
        h_(p.h, p.width) {
    const int64_t outputs = p.h.data == nullptr ? 1 : 2;
    const bool large = p.rows * p.width * outputs * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    // Memory that was just read is in the cache: there is nothing to gain by going past it.
    stream_y_ = large && y_.aligned() && p.y.data != p.x.data && p.y.data != p.residual.data;
    stream_h_ = large && h_.aligned() && p.h.data != p.x.data && p.h.data != p.residual.data;
  }

  void run(int64_t begin, int64_t end) const {
    static thread_local Buffer buffers[6];
    A* values = buffers[0].get<A>(p_.width);
    T* scratch_x = buffers[1].get<T>(x_.scratch_size());
    T* scratch_residual = buffers[2].get<T>(residual_.scratch_size());
    T* scratch_y = buffers[3].get<T>(y_.scratch_size());
    T* scratch_h = buffers[4].get<T>(h_.scratch_size());
    Mask* keep = buffers[5].get<Mask>(Dropout::masks(p_.width));
    for (int64_t i = begin; i < end; ++i) {
      Row<T> row;
      row.x = x_.get(i, scratch_x);
      row.residual = residual_.absent() ? nullptr : residual_.get(i, scratch_residual);
      row.keep = p_.rng == nullptr ? nullptr : keep;
      row.h = h_.absent() ? nullptr : h_.get(i, scratch_h);
      row.y = y_.get(i, scratch_y);
      if (p_.rng != nullptr) Dropout(p_.rng, p_.dropout_p).draw(i, p_.width, keep);
      normalize(i, row, values);
      if (row.h != nullptr) h_.put(i, row.h);
      y_.put(i, row.y);
    }
    if (stream_y_ || stream_h_) stream_fence();
  }

 private:
  void normalize(int64_t i, const Row<T>& row, A* values) const {
    double sum[1] = {0.0};
    const A* h = values;
    if (row.residual == nullptr) {
      h = read(row, values, sum);
    } else if (row.keep == nullptr) {
      row.h == nullptr ? add<false, false>(row, values, sum) : add<false, true>(row, values, sum);
    } else {
      row.h == nullptr ? add<true, false>(row, values, sum) : add<true, true>(row, values, sum);
    }
    const double width = static_cast<double>(p_.width);
    const A mean = p_.rms ? A(0) : static_cast<A>(sum[0] / width);
    const double variance = sum_of_squares(h, mean) / width;
    if (out_of_range(variance)) return normalize_by_power(i, h, values, row.y);
    const A rstd = static_cast<A>(1.0 / std::sqrt(variance + p_.eps));
    write_statistics(i, mean, rstd);
    write_row(h, mean, rstd, row.y);
  }

  // Have squares overflowed, or underflowed where eps does not make up for it?
  bool out_of_range(double variance) const {
    constexpr double kSmall = sizeof(A) == 4 ? 0x1p-100 : 0x1p-900;
    return !(variance <= std::numeric_limits<double>::max()) ||
           (variance < kSmall && p_.eps < kSmall * 0x1p30);
  }

  // The same for a row so large or so small that its squares leave the range of numbers: times a
  // power of two that brings it to about 1.
  FUSED_ATTN_NOINLINE void normalize_by_power(int64_t i, const A* h, A* values, T* y) const {
    A largest = 0;
    for (int64_t j = 0; j < p_.width; ++j) largest = std::max(largest, std::fabs(h[j]));
    const int exponent = std::isfinite(largest) && largest > 0 ? std::ilogb(largest) : 0;
    for (int64_t j = 0; j < p_.width; ++j) values[j] = std::ldexp(h[j], -exponent);
    const double width = static_cast<double>(p_.width);
    A mean = p_.rms ? A(0) : static_cast<A>(sum_of(values) / width);
    if (!p_.rms) mean += static_cast<A>(sum_above(mean, values) / width);  // equal numbers: exactly
    const double squares = sum_of_squares(values, mean);
    if (squares == 0.0) {  // equal numbers, whose size says nothing about their deviation
      const A rstd = static_cast<A>(1.0 / std::sqrt(p_.eps));
      write_statistics(i, std::ldexp(mean, exponent), rstd);
      return write_row(values, mean, rstd, y);
    }
    const double deviation =
        std::hypot(std::sqrt(squares / width), std::ldexp(std::sqrt(p_.eps), -exponent));
    write_statistics(i, std::ldexp(mean, exponent),
                     static_cast<A>(std::ldexp(1.0 / deviation, -exponent)));
    write_row(values, mean, static_cast<A>(1.0 / deviation), y);
  }

  void write_statistics(int64_t i, A mean, A rstd) const {
    if (p_.mean != nullptr) static_cast<A*>(p_.mean)[i] = mean;
    if (p_.rstd != nullptr) static_cast<A*>(p_.rstd)[i] = rstd;
  }

  void write_row(const A* h, A mean, A rstd, T* y) const {
    if (bias_ == nullptr) {
      scale<false>(h, mean, rstd, y);
    } else {
      scale<true>(h, mean, rstd, y);
    }
  }

  // The values of x and their sum; x itself where it needs no conversion.
  const A* read(const Row<T>& row, A* values, double (&sum)[1]) const {
    const T* x = row.x;
    if constexpr (std::is_same_v<T, A>) {
      if (!p_.rms) sum[0] = sum_of(x);
      values = const_cast<A*>(x);
    } else {
      sum_columns<A>(p_.width, sum, [=](int64_t i, auto lanes, V(&acc)[1]) FUSED_ATTN_BODY {
        const V v = load(x + i, lanes);
        put(values + i, v, lanes, false);
        acc[0] = acc[0] + v;
      });
    }
    return values;
  }

  template <bool kDropout, bool kStore>
  void add(const Row<T>& row, A* values, double (&sum)[1]) const {
    V factor = V::zero();
    if constexpr (kDropout) {
      factor = V::set1(static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
    }
    const bool streamed = stream_h_;
    const T *x = row.x, *residual = row.residual;
    const Mask* keep = row.keep;
    T* h = row.h;
    sum_columns<A>(p_.width, sum, [=](int64_t i, auto lanes, V(&acc)[1]) FUSED_ATTN_BODY {
      V v = load(x + i, lanes);
      if constexpr (kDropout) v = select(keep[i / kLanes], v * factor, V::zero());
      v = v + load(residual + i, lanes);
      if constexpr (kStore) {
        v = put_rounded(h + i, v, lanes, streamed);
      } else {
        v = rounded<T>(v);
      }
      put(values + i, v, lanes, false);
      acc[0] = acc[0] + v;
    });
  }

  double sum_of(const A* h) const {
    double sum[1];
    sum_columns<A>(p_.width, sum, [=](int64_t i, auto lanes, V(&acc)[1]) FUSED_ATTN_BODY {
      acc[0] = acc[0] + load(h + i, lanes);
    });
    return sum[0];
  }

  double sum_above(A mean, const A* h) const {
    double sum[1];
    const V m = V::set1(mean);
    sum_columns<A>(p_.width, sum, [=](int64_t i, auto lanes, V(&acc)[1]) FUSED_ATTN_BODY {
      acc[0] = acc[0] + first(load(h + i, lanes) - m, lanes);
    });
    return sum[0];
  }

  double sum_of_squares(const A* h, A mean) const {
    double sum[1];
    const V m = V::set1(mean);
    sum_columns<A>(p_.width, sum, [=](int64_t i, auto lanes, V(&acc)[1]) FUSED_ATTN_BODY {
      const V centred = first(load(h + i, lanes) - m, lanes);
      acc[0] = fma(centred, centred, acc[0]);
    });
    return sum[0];
  }

  template <bool kBias>
  void scale(const A* h, A mean, A rstd, T* y) const {
    const V m = V::set1(mean), r = V::set1(rstd);
    const bool streamed = stream_y_;
    const A *weight = weight_, *bias = bias_;
    for_columns(p_.width, [=](int64_t i, auto lanes) FUSED_ATTN_BODY {
      const V normalized = (load(h + i, lanes) - m) * r;
      const V w = load(weight + i, lanes);
      V v;
      if constexpr (kBias) {
        v = fma(normalized, w, load(bias + i, lanes));
      } else {
        v = normalized * w;
      }
      put(y + i, v, lanes, streamed);
    });
  }

  const Params& p_;
  const A* weight_;
  const A* bias_;  // null if absent
  Reader<T> x_, residual_;
  Writer<T> y_, h_;
  bool stream_y_ = false, stream_h_ = false;
};

// Tasks for each thread: more than one, so that a thread which is held up delays little.
constexpr int64_t kTasksPerThread = 4;

template <class T>
void forward_as(const Params& p) {
  using A = Compute<T>;
  static thread_local Buffer weight_buffer, bias_buffer;
  const A* weight = parameter_row<A>(p.weight, p.width, A(1), weight_buffer);
  const A* bias =
      p.bias.data == nullptr ? nullptr : parameter_row<A>(p.bias, p.width, A(0), bias_buffer);
  const Forward<T> kernel(p, weight, bias);
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

}  // namespace fused_attn::layer_norm::FUSED_ATTN_LEVEL
