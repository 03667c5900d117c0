// y = x W^T + bias, what an epilogue makes of it, and gradients.
#include "linear/cpu/product.h"

#include "linear/cpu/few_rows.h"
#include "linear/params.h"

namespace fused_attn::linear::FUSED_ATTN_LEVEL {
namespace {

const Rows kAbsent;

// Calls function(T*) for the dtype of a problem.
template <class Function>
void with_sixteen_or_thirty_two_bits(DType dtype, const Function& function) {
  with_problem_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) function(type);
  });
}

// to[i] = the sum over k of x(i, k): of parts, then of groups of parts, so that the error grows
// with the cube root of their number.
template <class T>
void sum_depth(const Operand<T>& x, int64_t count, int64_t depth, T* to, int threads) {
  constexpr int64_t kPart = 16, kGroup = 32 * kPart;
  parallel_for(threads, ceil_div(count, kLanes), [&](int64_t task) {
    alignas(64) float numbers[kPart * kLanes];
    const int64_t first = task * kLanes;
    const int lanes = static_cast<int>(smaller<int64_t>(kLanes, count - first));
    VecF total = VecF::zero(), group = VecF::zero();
    for (int64_t begin = 0; begin < depth; begin += kPart) {
      const int64_t part = smaller(kPart, depth - begin);
      pack_lanes(x, first, lanes, begin, part, numbers, kLanes);
      VecF sum = VecF::zero();
      for (int64_t k = 0; k < part; ++k) sum = sum + VecF::load(numbers + k * kLanes);
      group = group + sum;
      if ((begin + kPart) % kGroup == 0) {
        total = total + group;
        group = VecF::zero();
      }
    }
    total = total + group;
    lanes == kLanes ? store(to + first, total) : store(to + first, total, lanes);
  });
}

// The same call with dy after the dropout.
BackwardParams with_dropped(BackwardParams p) {
  with_sixteen_or_thirty_two_bits(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static thread_local Buffer buffer;
    T* dropped = buffer.get<T>(p.rows * p.out);
    const Reader<T> dy(p.dy, p.out);
    const Dropout dropout(p.rng, p.dropout_p);
    const VecF factor = VecF::set1(static_cast<float>(dropout.scale()));
    parallel_for(threads_for(p.rows, p.out, p.threads), p.rows, [&](int64_t row) {
      static thread_local Buffer buffers[2];
      const T* from = dy.get(row, buffers[0].get<T>(dy.scratch_size()));
      Mask* keep = buffers[1].get<Mask>(Dropout::masks(p.out));
      dropout.draw(row, p.out, keep);
      T* to = dropped + row * p.out;
      for_columns(p.out, [=](int64_t j, auto lanes) FUSED_ATTN_BODY {
        put(to + j, select(keep[j / kLanes], load(from + j, lanes) * factor, VecF::zero()), lanes,
            false);
      });
    });
    p.dy.data = dropped;
    p.dy.outer = {1, {p.rows}, {p.out}};
    p.dy.inner = {1, {p.out}, {1}};
  });
  return p;
}

}  // namespace

void forward(const Params& p) {
  if (p.rows == 0 || p.out == 0) return;
  with_sixteen_or_thirty_two_bits(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FewRows<T>::serves(p) ? FewRows<T>(p).run() : Product<T>(p).run(p.threads);
  });
}

void backward(const BackwardParams& given) {
  const BackwardParams p = given.rng == nullptr ? given : with_dropped(given);
  with_sixteen_or_thirty_two_bits(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (p.dx.data != nullptr && p.rows > 0 && p.in > 0) {
      Product<T>(by_rows<T>(p.dy), by_columns<T>(p.weight), kAbsent, p.dx, p.rows, p.in, p.out)
          .run(p.threads);
    }
    if (p.dweight.data != nullptr && p.out > 0 && p.in > 0) {
      Product<T>(by_columns<T>(p.dy), by_columns<T>(p.x), kAbsent, p.dweight, p.out, p.in, p.rows)
          .run(p.threads);
    }
    if (p.dbias.data != nullptr) {
      sum_depth<T>(by_columns<T>(p.dy), p.out, p.rows, static_cast<T*>(p.dbias.data), p.threads);
    }
  });
}

}  // namespace fused_attn::linear::FUSED_ATTN_LEVEL
