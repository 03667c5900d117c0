// Gradients of y = norm(h) * weight + bias with h = dropout(x) + residual:
//
//   xhat = (h - mean) * rstd,  g = dy * weight
//   dh += rstd * (g - average(g) - xhat * average(g * xhat))     RMSNorm: without average(g)
//   dresidual = dh,  dx = dh where x was kept, times 1 / (1 - p)
//   dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy
//
// Blocks of rows go through two passes: one for the averages, one for the gradients. In the second
// pass the rows of a block add to dweight and dbias together, so that these are read and written
// once a block (cpu/row_sums.h). Each pass prefetches a part of the next block, a line at a
// time between the arithmetic, so that requests are in flight all the time: dy in the first pass,
// the rest in the second. All of it in the second took half as long again.
#include "cpu/row_dropout.h"
#include "cpu/row_sums.h"
#include "layer_norm/params.h"

namespace fused_attn::layer_norm::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

namespace {

// What the second pass needs of a row. H: the type of h in memory, that of the operands or, where
// it is computed again, that of the arithmetic.
template <class T, class H, class A>
struct Row {
  const T* dy;
  const T* dh;  // gradient of the sum, or null
  const H* h;
  const Mask* keep;  // of the dropout, or null
  T* dx;
  T* dresidual;  // null unless it differs from dx
  A mean, rstd;
  A normal_rstd;  // of h as it lies here, which may be times a power of two, and so may its mean
  A mean_g, mean_g_xhat;  // the two averages
};

// Rows of the next block that a pass prefetches while it goes over the columns of this one.
template <class T>
struct NextRows {
  const T* row[3 * kBlockRows];
  int count = 0;

  void add(const T* next) {
    if (next != nullptr) row[count++] = next;
  }

  // Twice a cache line's worth of loads would be wasted on 16-bit types.
  FUSED_ATTN_INLINE void prefetch_column(int64_t column) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (column % kLine != 0) return;
    for (int i = 0; i < count; ++i) prefetch(row[i] + column);
  }
};

// Below this size of an operand the next rows are in a cache anyway.
constexpr int64_t kMinPrefetchBytes = int64_t{1} << 20;

template <class T, class H>
class Backward {
 public:
  using A = Compute<T>;
  using V = Vec<A>;

  Backward(const BackwardParams& p, const A* weight)
      : p_(p),
        weight_(weight),
        dy_(p.dy, p.width),
        dh_(p.dh, p.width),
        h_(p.h, p.width),
        x_(p.x, p.width),
        residual_(p.residual, p.width),
        // Without dropout both gradients are the same numbers: one of them is computed.
        dx_(p.dx.data == nullptr && p.rng == nullptr ? p.dresidual : p.dx, p.width),
        dresidual_(p.dresidual, p.width),
        split_(p.dresidual.data != nullptr && (p.rng != nullptr || p.dx.data != nullptr)) {
    const int64_t outputs = split_ ? 2 : 1;
    const bool large = p.rows * p.width * outputs * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    stream_dx_ = large && dx_.aligned() && (!split_ || dresidual_.aligned());
    prefetches_ = p.rows * p.width * static_cast<int64_t>(sizeof(T)) >= kMinPrefetchBytes;
  }

  // Adds the parameters' gradients of these rows to dweight and dbias (width elements).
  void run(int64_t begin, int64_t end, A* dweight, A* dbias) const {
    static thread_local Buffer buffer;
    A* group = buffer.get<A>(2 * p_.width);
    for (int64_t first = begin; first < end; first += kGroupRows) {
      std::fill_n(group, 2 * p_.width, A(0));
      run_group(first, std::min(end, first + kGroupRows), group, group + p_.width);
      add_to(dweight, group, p_.width);
      add_to(dbias, group + p_.width, p_.width);
    }
  }

 private:
  void run_group(int64_t begin, int64_t end, A* dweight, A* dbias) const {
    const int64_t width = p_.width, masks = Dropout::masks(width);
    static thread_local Buffer buffers[11];
    T* scratch_dy = buffers[0].get<T>(kBlockRows * dy_.scratch_size());
    T* scratch_dh = buffers[1].get<T>(kBlockRows * dh_.scratch_size());
    H* scratch_h = buffers[2].get<H>(kBlockRows * width);
    T* scratch_x = buffers[3].get<T>(x_.scratch_size());
    T* scratch_residual = buffers[4].get<T>(residual_.scratch_size());
    T* scratch_dx = buffers[5].get<T>(kBlockRows * dx_.scratch_size());
    T* scratch_dresidual = buffers[6].get<T>(kBlockRows * dresidual_.scratch_size());
    Mask* keep = buffers[7].get<Mask>(kBlockRows * masks);
    // Stands in for the rows that the last block lacks: it adds 0 to every sum.
    Row<T, H, A> missing = {};
    if ((end - begin) % kBlockRows != 0) {
      missing.dy = std::fill_n(buffers[8].get<T>(width), width, T{}) - width;
      missing.h = std::fill_n(buffers[9].get<H>(width), width, H{}) - width;
      missing.dx = buffers[10].get<T>(width);
    }
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockRows, end - first));
      Row<T, H, A> rows[kBlockRows];
      for (int r = 0; r < count; ++r) {
        Row<T, H, A>& row = rows[r];
        const int64_t i = first + r;
        row.keep = nullptr;
        if (p_.rng != nullptr) {
          Dropout(p_.rng, p_.dropout_p).draw(i, width, keep + r * masks);
          row.keep = keep + r * masks;
        }
        row.dy = dy_.get(i, scratch_dy + r * dy_.scratch_size());
        row.dh = dh_.absent() ? nullptr : dh_.get(i, scratch_dh + r * dh_.scratch_size());
        row.h = sum_row(i, row.keep, scratch_h + r * width, scratch_x, scratch_residual);
        row.dx = dx_.get(i, scratch_dx + r * dx_.scratch_size());
        row.dresidual =
            split_ ? dresidual_.get(i, scratch_dresidual + r * dresidual_.scratch_size()) : nullptr;
        row.h = load_statistics(i, row, scratch_h + r * width);
        NextRows<T> next_rows;
        if (prefetches_ && i + kBlockRows < end) next_rows.add(dy_.direct(i + kBlockRows));
        averages(next_rows, row);
      }
      std::fill(rows + count, rows + kBlockRows, missing);
      gradients(rows, rows_after(first, end), dweight, dbias);
      for (int r = 0; r < count; ++r) {
        dx_.put(first + r, rows[r].dx);
        if (split_) dresidual_.put(first + r, rows[r].dresidual);
      }
    }
    if (stream_dx_) stream_fence();
  }

  // h of row i: as it was kept, or computed as the forward did.
  const H* sum_row(int64_t i, const Mask* keep, H* values, T* scratch_x,
                   T* scratch_residual) const {
    if constexpr (std::is_same_v<H, T>) {
      if (!h_.absent()) return h_.get(i, reinterpret_cast<T*>(values));
    }
    const T* x = x_.get(i, scratch_x);
    const T* residual = residual_.get(i, scratch_residual);
    if constexpr (std::is_same_v<H, A>) {
      const V factor =
          V::set1(keep == nullptr ? A(1) : static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
      for_columns(p_.width, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
        V v = load(x + j, lanes);
        if (keep != nullptr) v = select(keep[j / kLanes], v * factor, V::zero());
        v = v + load(residual + j, lanes);
        put(values + j, rounded<T>(v), lanes, false);
      });
    }
    return values;
  }

  // Where h of row i is to be read. Differences of rows near the end of the range of numbers would
  // overflow: they are made smaller.
  const H* load_statistics(int64_t i, Row<T, H, A>& row, H* values) const {
    row.mean = p_.mean == nullptr ? A(0) : static_cast<const A*>(p_.mean)[i];
    row.rstd = row.normal_rstd = static_cast<const A*>(p_.rstd)[i];
    // All numbers of a row are its mean where that is so large beside their deviation; and what
    // stands for 0 behind the row's end must not become infinite.
    if (std::isfinite(row.rstd) && !std::isfinite(row.mean * row.rstd)) row.normal_rstd = A(0);
    constexpr A kLarge = sizeof(A) == 4 ? A(0x1p-100) : A(0x1p-1000);
    if (!(row.rstd < kLarge)) return row.h;
    constexpr A kFactor = A(0x1p-32);
    for (int64_t j = 0; j < p_.width; ++j) values[j] = convert<H>(convert<A>(row.h[j]) * kFactor);
    row.mean *= kFactor;
    row.normal_rstd /= kFactor;
    return values;
  }

  void averages(const NextRows<T>& next_rows, Row<T, H, A>& row) const {
    const V mean = V::set1(row.mean), rstd = V::set1(row.normal_rstd);
    const T* dy = row.dy;
    const H* h = row.h;
    const A* weight = weight_;
    double sums[2];
    sum_columns<A>(p_.width, sums, [=](int64_t j, auto lanes, V(&acc)[2]) FUSED_ATTN_BODY {
      next_rows.prefetch_column(j);
      const V g = load(dy + j, lanes) * load(weight + j, lanes);
      const V xhat = (load(h + j, lanes) - mean) * rstd;
      acc[0] = acc[0] + g;
      acc[1] = fma(g, xhat, acc[1]);
    });
    const double width = static_cast<double>(p_.width);
    row.mean_g = p_.rms ? A(0) : static_cast<A>(sums[0] / width);
    row.mean_g_xhat = static_cast<A>(sums[1] / width);
  }

  // What the block after the one at `first` needs besides dy.
  NextRows<T> rows_after(int64_t first, int64_t end) const {
    NextRows<T> next_rows;
    if (!prefetches_) return next_rows;
    const int64_t from = first + kBlockRows, to = std::min(end, from + kBlockRows);
    for (const Reader<T>* reader : {&dh_, h_.absent() ? &x_ : &h_, &residual_}) {
      if (reader->absent()) continue;
      for (int64_t i = from; i < to; ++i) next_rows.add(reader->direct(i));
    }
    return next_rows;
  }

  void gradients(const Row<T, H, A>* rows, const NextRows<T>& next_rows, A* dweight,
                 A* dbias) const {
    const bool streamed = stream_dx_;
    const V factor =
        V::set1(p_.rng == nullptr ? A(1) : static_cast<A>(Dropout(p_.rng, p_.dropout_p).scale()));
    V mean[kBlockRows], normal_rstd[kBlockRows], rstd[kBlockRows], mean_g[kBlockRows],
        mean_g_xhat[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) {
      mean[r] = V::set1(rows[r].mean);
      normal_rstd[r] = V::set1(rows[r].normal_rstd);
      rstd[r] = V::set1(rows[r].rstd);
      mean_g[r] = V::set1(rows[r].mean_g);
      mean_g_xhat[r] = V::set1(rows[r].mean_g_xhat);
    }
    const A* weight = weight_;
    for_columns(p_.width, [&](int64_t j, auto lanes) FUSED_ATTN_BODY {
      const V w = load(weight + j, lanes);
      V dw = V::zero(), db = V::zero();
      next_rows.prefetch_column(j);
      FUSED_ATTN_UNROLL
      for (int r = 0; r < kBlockRows; ++r) {
        const Row<T, H, A>& row = rows[r];
        const V dy = load(row.dy + j, lanes);
        const V xhat = (load(row.h + j, lanes) - mean[r]) * normal_rstd[r];
        dw = fma(dy, xhat, dw);
        db = db + dy;
        // The difference first: it is exactly 0 where all of a row's g are equal.
        const V centred = dy * w - mean_g[r];
        V dh = fma(V::zero() - xhat, mean_g_xhat[r], centred) * rstd[r];
        if (row.dh != nullptr) dh = dh + load(row.dh + j, lanes);
        if (row.dresidual != nullptr) put(row.dresidual + j, dh, lanes, streamed);
        if (row.keep != nullptr) dh = select(row.keep[j / kLanes], dh * factor, V::zero());
        put(row.dx + j, dh, lanes, streamed);
      }
      put(dweight + j, load(dweight + j, lanes) + dw, lanes, false);
      put(dbias + j, load(dbias + j, lanes) + db, lanes, false);
    });
  }

  const BackwardParams& p_;
  const A* weight_;
  Reader<T> dy_, dh_, h_, x_, residual_;
  Writer<T> dx_, dresidual_;
  bool split_;  // dx and dresidual are two outputs
  bool stream_dx_ = false, prefetches_ = false;
};

template <class T, class H>
void backward_as(const BackwardParams& p) {
  using A = Compute<T>;
  static thread_local Buffer weight_buffer, sums_buffer;
  const A* weight = parameter_row<A>(p.weight, p.width, A(1), weight_buffer);
  const Backward<T, H> kernel(p, weight);
  const int threads = threads_for(p.rows, p.width, p.threads);
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(blocks, threads));
  // Whole cache lines for each task, and none shared.
  const int64_t stride = (p.width + 63) / 64 * 64;
  A* sums = sums_buffer.get<A>(2 * tasks * stride);
  A* bias_sums = sums + tasks * stride;
  parallel_for(threads, tasks, [&](int64_t t) {
    A* dweight = sums + t * stride;
    A* dbias = bias_sums + t * stride;
    std::fill_n(dweight, stride, A(0));
    std::fill_n(dbias, stride, A(0));
    kernel.run(blocks * t / tasks * kBlockRows,
               std::min(p.rows, blocks * (t + 1) / tasks * kBlockRows), dweight, dbias);
  });
  write_parameter_gradient(p.dweight, p.width, sums, tasks, stride);
  write_parameter_gradient(p.dbias, p.width, bias_sums, tasks, stride);
}

}  // namespace

void backward(const BackwardParams& p) {
  if (p.width == 0) return;
  // x is h where nothing was added to it.
  BackwardParams q = p;
  if (q.h.data == nullptr && p.residual.data == nullptr) q.h = p.x;
  with_problem_type(q.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (q.h.data != nullptr) {
      backward_as<T, T>(q);
    } else {
      backward_as<T, Compute<T>>(q);
    }
  });
}

}  // namespace fused_attn::layer_norm::FUSED_ATTN_LEVEL
