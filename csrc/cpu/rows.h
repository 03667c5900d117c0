// Rows in and out of the kernels that treat each row by itself (norms, activations): dense rows of
// the kernel's own type are used where they lie, all others pass through a scratch row. Also the
// loops and stores that these kernels share.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/row_view.h"
#include "cpu/kernel_dtypes.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fused_attn::FUSED_ATTN_LEVEL {

// Of statistics and arithmetic.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Of what is computed and then stored as T.
template <class T>
constexpr Precision kPrecisionOf = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float>      ? DType::kFloat32
                           : std::is_same_v<T, double>   ? DType::kFloat64
                           : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                         : DType::kFloat16;

// Calls function(T*) with a null pointer of the type that `dtype` names.
template <class Function>
void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return function(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return function(static_cast<Float16*>(nullptr));
    default:
      return;  // the binding lets floating dtypes through only
  }
}

// The same for the dtype of a problem, which this level has kernels for.
template <class Function>
void with_problem_type(DType dtype, const Function& function) {
  with_type(dtype, [&](auto* type) {
    if constexpr (has_kernels(kDTypeOf<std::remove_pointer_t<decltype(type)>>)) function(type);
  });
}

// The same for an operand that is read or written as T. No operand of a 16-bit problem is of
// another type, but for the parameters, which are read as what the arithmetic is in.
template <class T, class Function>
void with_operand_type(DType dtype, const Function& function) {
  if constexpr (sizeof(T) == 2) {
    function(static_cast<T*>(nullptr));
  } else {
    with_type(dtype, function);
  }
}

template <class To, class From>
To convert(From from) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
  } else if constexpr (std::is_same_v<From, double>) {
    return convert<To>(static_cast<float>(from));
  } else if constexpr (std::is_same_v<To, double>) {
    return to_float(from);
  } else {
    To to;
    from_float(to_float(from), &to);
    return to;
  }
}

template <class To, class From>
void convert_dense(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  // Operands differ from the sum's type only where one of the two is float32.
  if constexpr (std::is_same_v<To, float> != std::is_same_v<From, float> &&
                !std::is_same_v<To, double> && !std::is_same_v<From, double>) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count)
      store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  } else {
    for (; i < count; ++i) to[i] = convert<To>(from[i]);
  }
}

// Reads rows as T.
template <class T>
class Reader {
 public:
  Reader(const Rows& rows, int64_t width)
      : rows_(&rows), width_(width), direct_(rows.dtype == kDTypeOf<T> && rows.inner.dense()) {}

  bool absent() const { return rows_->data == nullptr; }
  int64_t scratch_size() const { return direct_ || absent() ? 0 : width_; }

  // Where get() finds the row; null if it has to be converted.
  const T* direct(int64_t row) const {
    return direct_ ? static_cast<const T*>(rows_->data) + rows_->outer.offset(row) : nullptr;
  }

  const T* get(int64_t row, T* scratch) const {
    const int64_t offset = rows_->outer.offset(row);
    if (direct_) return static_cast<const T*>(rows_->data) + offset;
    with_operand_type<T>(rows_->dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      const S* from = static_cast<const S*>(rows_->data) + offset;
      if (rows_->inner.dense()) return convert_dense(from, scratch, width_);
      for (int64_t i = 0; i < width_; ++i) scratch[i] = convert<T>(from[rows_->inner.offset(i)]);
    });
    return scratch;
  }

 private:
  const Rows* rows_;
  int64_t width_;
  bool direct_;
};

// Writes rows that are computed as T: fill what get() gives, then call put().
template <class T>
class Writer {
 public:
  Writer(const Rows& rows, int64_t width)
      : rows_(&rows), width_(width), direct_(rows.dtype == kDTypeOf<T> && rows.inner.dense()) {}

  bool absent() const { return rows_->data == nullptr; }
  int64_t scratch_size() const { return direct_ && !absent() ? 0 : width_; }

  // An absent operand is computed into the scratch row too, and dropped.
  T* get(int64_t row, T* scratch) const {
    if (!direct_ || absent()) return scratch;
    return static_cast<T*>(rows_->data) + rows_->outer.offset(row);
  }

  void put(int64_t row, const T* scratch) const {
    if (direct_ || absent()) return;
    with_operand_type<T>(rows_->dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      S* to = static_cast<S*>(rows_->data) + rows_->outer.offset(row);
      if (rows_->inner.dense()) return convert_dense(scratch, to, width_);
      for (int64_t i = 0; i < width_; ++i) to[rows_->inner.offset(i)] = convert<S>(scratch[i]);
    });
  }

  // Whether every vector store of every row is aligned, as a streaming store must be.
  bool aligned() const {
    if (!direct_ || absent()) return false;
    bool aligned = reinterpret_cast<uintptr_t>(rows_->data) % 64 == 0;
    for (int d = 0; d < rows_->outer.count; ++d) {
      aligned = aligned && rows_->outer.stride[d] * static_cast<int64_t>(sizeof(T)) % 64 == 0;
    }
    return aligned;
  }

 private:
  const Rows* rows_;
  int64_t width_;
  bool direct_;
};

// Outputs beyond this would only push useful lines out of the caches: stream them past.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// After the parameters of a lambda that is a loop's body: without it the body may become a function
// that is called for every 16 columns. Such lambdas capture by value, so that pointers and
// constants stay in registers whatever the body stores.
#if defined(__GNUC__)
#define FUSED_ATTN_BODY __attribute__((always_inline))
#else
#define FUSED_ATTN_BODY
#endif

// How many lanes a step of a loop over columns covers: all of them, or those that are left.
struct AllLanes {};
struct SomeLanes {
  int count;
};
template <class T>
FUSED_ATTN_INLINE auto load(const T* from, AllLanes) {
  return load(from);
}
template <class T>
FUSED_ATTN_INLINE auto load(const T* from, SomeLanes lanes) {
  return load(from, lanes.count);
}
template <class T, class V>
FUSED_ATTN_INLINE void put(T* to, const V& v, AllLanes, bool streamed) {
  if (streamed) {
    stream(to, v);
  } else {
    store(to, v);
  }
}
template <class T, class V>
FUSED_ATTN_INLINE void put(T* to, const V& v, SomeLanes lanes, bool) {
  store(to, v, lanes.count);
}

// Stores v to memory of type T and returns it as it would come back.
template <class T>
FUSED_ATTN_INLINE Vec<Compute<T>> put_rounded(T* to, const Vec<Compute<T>>& v, AllLanes,
                                              bool streamed) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    put(to, v, AllLanes{}, streamed);
    return v;
  } else {
    return store_rounded(to, v, streamed);
  }
}
template <class T>
FUSED_ATTN_INLINE Vec<Compute<T>> put_rounded(T* to, const Vec<Compute<T>>& v, SomeLanes lanes,
                                              bool) {
  store(to, v, lanes.count);
  return load(to, lanes.count);
}
template <class T>
FUSED_ATTN_INLINE Vec<Compute<T>> rounded(const Vec<Compute<T>>& v) {
  alignas(64) T memory[kLanes];
  return put_rounded(memory, v, AllLanes{}, false);
}

// Accumulators in flight: enough to hide the latency of an addition.
constexpr int kChains = 4;
// Columns that are added in vector accumulators before these go into a double: long rows then lose
// no more accuracy than short ones.
constexpr int64_t kSumColumns = 4096;

// The sum over a row of what step(column, lanes, kNumSums accumulators) adds to its accumulators.
template <class A, int kNumSums, class Step>
FUSED_ATTN_INLINE void sum_columns(int64_t width, double (&total)[kNumSums], const Step& step) {
  for (double& t : total) t = 0.0;
  for (int64_t start = 0; start < width; start += kSumColumns) {
    const int64_t end = std::min(width, start + kSumColumns);
    Vec<A> chain[kChains][kNumSums];
    for (auto& sums : chain) {
      for (auto& s : sums) s = Vec<A>::zero();
    }
    int64_t i = start;
    for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
      FUSED_ATTN_UNROLL
      for (int c = 0; c < kChains; ++c) step(i + c * kLanes, AllLanes{}, chain[c]);
    }
    for (; i + kLanes <= end; i += kLanes) step(i, AllLanes{}, chain[0]);
    if (i < end) step(i, SomeLanes{static_cast<int>(end - i)}, chain[0]);
    for (int s = 0; s < kNumSums; ++s) {
      total[s] += sum((chain[0][s] + chain[1][s]) + (chain[2][s] + chain[3][s]));
    }
  }
}

template <class Step>
FUSED_ATTN_INLINE void for_columns(int64_t width, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) step(i, AllLanes{});
  if (i < width) step(i, SomeLanes{static_cast<int>(width - i)});
}

// Weight or bias as one dense row of the arithmetic's type; `absent` fills the row where there is
// none.
template <class A>
const A* parameter_row(const Rows& rows, int64_t width, A absent, Buffer& buffer) {
  const Reader<A> reader(rows, width);
  if (reader.absent()) {
    A* row = buffer.get<A>(width);
    std::fill_n(row, width, absent);
    return row;
  }
  return reader.get(0, buffer.get<A>(reader.scratch_size()));
}

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerialElements = int64_t{1} << 15;

inline int threads_for(int64_t rows, int64_t width, int threads) {
  return rows * width < kSerialElements ? 1 : std::max(1, threads);
}

}  // namespace fused_attn::FUSED_ATTN_LEVEL
