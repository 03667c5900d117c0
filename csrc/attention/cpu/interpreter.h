// Runs the instructions of attention/functions.h on strips: a few keys by the queries of a block,
// so that a register of all its numbers stays in the first cache.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention/cpu/sequence.h"
#include "attention/functions.h"
#include "cpu/parallel.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

constexpr int kStripKeys = 8;
constexpr int kStrip = kStripKeys * kBlockQ;

// Where a strip is and what is loaded from its tile, each row kStrideQ numbers after the last.
template <class Real>
struct Strip {
  int64_t key;  // the first
  int keys;
  const Real* scores = nullptr;
  const Real* gradient = nullptr;
  const uint64_t* visible = nullptr;  // bit = query; null: all rows see all
};

inline constexpr std::array<uint64_t, kBlockK> all_visible() {
  std::array<uint64_t, kBlockK> words{};
  for (int c = 0; c < kBlockK; ++c) words[c] = ~uint64_t{0};
  return words;
}
inline constexpr auto kAllVisible = all_visible();

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kBool:
      return 1;
    default:
      return 4;
  }
}

// One program with its registers, for one head.
template <class Real>
class Interpreter {
  using V = Vec<Real>;
  using Int = int32_t;
  using Operation = PairOperation;

 public:
  Interpreter() = default;
  Interpreter(const PairFunctions& functions, const PairProgram& program, const Sequence& sequence,
              int64_t head, Real scale, Buffer& reals, Buffer& ints)
      : functions_(&functions),
        program_(program),
        batch_(sequence.batch),
        head_(head),
        seqlen_k_(sequence.seqlen_k),
        scale_(scale),
        reals_(reals.get<Real>(program.reals * kStrip)),
        ints_(ints.get<Int>(program.ints * kStrip)) {
    if (has_code()) find_leaves();
    width_ = kBlockQ;
    count_ = kStrip;
    run(0, program_.per_block, {0, kStripKeys});
  }

  explicit operator bool() const { return static_cast<bool>(program_); }

  void select_queries(int64_t first, int rows) {
    first_ = first;
    rows_ = rows;
    width_ = static_cast<int>(ceil_div(rows, kLanes)) * kLanes;
    count_ = kStripKeys * width_;
    run(program_.per_block, program_.per_tile, {0, kStripKeys});
  }

  void run(const Strip<Real>& strip) {
    count_ = strip.keys * width_;
    run(program_.per_tile, program_.count, strip);
  }

  // Is the last stage machine code? Then run_code() takes run()'s place, with its results where
  // they belong, on any number of keys of a tile.
  bool has_code() const { return program_.code != nullptr; }

  void run_code(const Strip<Real>& strip, Real* result, Real* slope, uint64_t* truths) {
    MachineStrip s;
    s.reals = reals_;
    s.ints = ints_;
    s.register_size = kStrip;
    s.leaves = leaves_.data();
    s.scores = strip.scores;
    s.gradient = strip.gradient;
    s.stride = kStrideQ;
    s.visible = strip.visible == nullptr ? kAllVisible.data() : strip.visible;
    s.result = result;
    s.slope = slope;
    s.truths = truths;
    s.valid = ~uint64_t{0} >> (kBlockQ - rows_);
    s.rows = rows_;
    s.width = width_;
    s.keys = strip.keys;
    s.first = first_;
    s.key = strip.key;
    s.distance = distance(strip.key);
    s.scale = static_cast<double>(scale_);
    s.outside = 0;
    program_.code(&s);
    if (s.outside != 0) functions_->outside = true;
  }

  // Rows of a result, `width()` numbers each.
  int width() const { return width_; }
  const Real* result() const { return real(program_.result); }
  const Real* slope() const { return real(program_.slope); }
  const Int* truths() const { return integer(program_.result); }
  bool has_slope() const { return program_.slope >= 0; }

 private:
  void find_leaves() {
    const auto moved = [&](void* data, DType dtype, int64_t by_batch, int64_t by_head) {
      const int64_t numbers = batch_ * by_batch + head_ * by_head;
      return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) +
                                     static_cast<uintptr_t>(numbers * bytes_of(dtype)));
    };
    leaves_.resize(functions_->leaves.size());
    for (size_t n = 0; n < leaves_.size(); ++n) {
      const PairLeaf& from = functions_->leaves[n];
      const View4 &view = from.view, &gradient = from.gradient;
      MachineLeaf& to = leaves_[n];
      to.table = view.data;
      to.vector = moved(view.data, view.dtype, view.stride[0], view.stride[1]);
      to.gradient =
          from.gradient_by_head
              ? moved(gradient.data, gradient.dtype, from.gradient_batch, from.gradient_head)
              : moved(gradient.data, gradient.dtype, gradient.stride[0], gradient.stride[1]);
      std::memcpy(to.size, from.size, sizeof to.size);
      std::memcpy(to.stride, view.stride, sizeof to.stride);
      std::memcpy(to.gradient_stride, gradient.stride, sizeof to.gradient_stride);
    }
  }

  Real* real(int64_t n) const { return reals_ + n * kStrip; }
  Int* integer(int64_t n) const { return ints_ + n * kStrip; }

  void run(int64_t begin, int64_t end, const Strip<Real>& strip) {
    for (int64_t n = begin; n < end; ++n) {
      const PairInstruction& x = program_.instructions[n];
      if (x.operation <= Operation::k_gather_int) {
        load(x, strip);
      } else if (x.operation <= Operation::k_ne) {
        compute(x);
      } else if (x.operation <= Operation::k_ne_int) {
        compute_int(x);
      } else {
        sum_up(x, strip);
      }
    }
  }

  // Lanes run in sixteens, which is what compilers need to see to make vectors of them.
  template <class To, class Function>
  FUSED_ATTN_INLINE void each(To* to, const Function& function) const {
    for (int at = 0; at < count_; at += kLanes) {
      To lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = function(at + l);
      std::memcpy(to + at, lanes, sizeof lanes);
    }
  }
  template <class Function>
  FUSED_ATTN_INLINE void each_vector(Real* to, const Real* a, const Function& function) const {
    for (int at = 0; at < count_; at += kLanes) function(V::load(a + at)).store(to + at);
  }

  // --- loads ---

  void load(const PairInstruction& x, const Strip<Real>& strip) {
    switch (x.operation) {
      case Operation::k_constant: {
        const Real value = static_cast<Real>(x.value);
        return each(real(x.out), [&](int) { return value; });
      }
      case Operation::k_constant_int: {
        const Int value = static_cast<Int>(x.value);
        return each(integer(x.out), [&](int) { return value; });
      }
      case Operation::k_load_one:
        return fill(real(x.out), *vector<Real>(x, 0));
      case Operation::k_load_one_int:
        return fill(integer(x.out), *vector<Int>(x, 0));
      case Operation::k_load_query:
        return load_rows(vector<Real>(x, first_), 0, real(x.out), kStripKeys);
      case Operation::k_load_query_int:
        return load_rows(vector<Int>(x, first_), 0, integer(x.out), kStripKeys);
      case Operation::k_load_key:
        return load_keys(vector<Real>(x, strip.key), real(x.out), strip.keys);
      case Operation::k_load_key_int:
        return load_keys(vector<Int>(x, strip.key), integer(x.out), strip.keys);
      case Operation::k_load_distance:
        return load_rows(vector<Real>(x, distance(strip.key)), -1, real(x.out), strip.keys);
      case Operation::k_load_distance_int:
        return load_rows(vector<Int>(x, distance(strip.key)), -1, integer(x.out), strip.keys);
      case Operation::k_load_score:
        return load_score(strip, real(x.out));
      case Operation::k_load_gradient:
        return load_tile(strip.gradient, real(x.out), strip.keys);
      case Operation::k_load_visible:
        return load_visible(strip, integer(x.out));
      case Operation::k_gather:
        return gather(x, real(x.out));
      default:
        return gather(x, integer(x.out));
    }
  }

  // Place of query - key, of the first query and this key, in a vector by distance.
  int64_t distance(int64_t key) const { return first_ - key + seqlen_k_ - 1; }

  template <class T>
  const T* vector(const PairInstruction& x, int64_t place) const {
    return at<const T>(functions_->leaves[x.leaf].view, batch_, head_, place);
  }

  template <class T>
  void fill(T* to, T value) const {
    each(to, [&](int) { return value; });
  }

  // Row c from `from` + c * step on. Lanes past the last query repeat it: they are as harmless.
  template <class T>
  void load_rows(const T* from, int64_t step, T* to, int keys) const {
    for (int c = 0; c < keys; ++c, from += step, to += width_) {
      std::memcpy(to, from, sizeof(T) * static_cast<size_t>(rows_));
      for (int q = rows_; q < width_; ++q) to[q] = from[rows_ - 1];
    }
  }

  template <class T>
  void load_keys(const T* from, T* to, int keys) const {
    for (int c = 0; c < keys; ++c, to += width_) {
      const T value = from[c];
      for (int q = 0; q < width_; ++q) to[q] = value;
    }
  }

  void load_tile(const Real* from, Real* to, int keys) const {
    for (int c = 0; c < keys; ++c, from += kStrideQ, to += width_) {
      std::memcpy(to, from, sizeof(Real) * static_cast<size_t>(width_));
    }
  }

  void load_score(const Strip<Real>& strip, Real* to) const {
    const V scale = V::set1(scale_);
    const Real* from = strip.scores;
    for (int c = 0; c < strip.keys; ++c, from += kStrideQ, to += width_) {
      for (int q = 0; q < width_; q += kLanes) (V::load(from + q) * scale).store(to + q);
    }
  }

  void load_visible(const Strip<Real>& strip, Int* to) const {
    for (int c = 0; c < strip.keys; ++c, to += width_) {
      const uint64_t word = strip.visible == nullptr ? ~uint64_t{0} : strip.visible[c];
      for (int q = 0; q < width_; ++q) to[q] = static_cast<Int>(word >> q & 1) & Int(q < rows_);
    }
  }

  // Calls call(lane, offset) for each number that is gathered; an index that leaves its table is
  // noted, and counts as 0.
  template <class Call>
  void for_each_index(const PairInstruction& x, const PairLeaf& table, const Call& call) const {
    const int dims = table.dims;
    bool outside = false;
    for (int at = 0; at < count_; ++at) {
      int64_t offset = 0;
      for (int d = 0; d < dims; ++d) {
        int64_t index = integer(x.arg[d])[at];
        if (index < 0) index += table.size[d];
        const bool wrong = static_cast<uint64_t>(index) >= static_cast<uint64_t>(table.size[d]);
        outside |= wrong;
        offset += wrong ? 0 : index * table.view.stride[d];
      }
      call(at, offset);
    }
    if (outside) functions_->outside = true;
  }

  template <class T>
  void gather(const PairInstruction& x, T* to) const {
    const PairLeaf& table = functions_->leaves[x.leaf];
    const auto from = [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      const S* values = static_cast<const S*>(table.view.data);
      for_each_index(x, table, [&](int at, int64_t offset) {
        if constexpr (std::is_same_v<S, Float16> || std::is_same_v<S, BFloat16>) {
          to[at] = static_cast<T>(to_float(values[offset]));
        } else {
          to[at] = static_cast<T>(values[offset]);
        }
      });
    };
    switch (table.view.dtype) {
      case DType::kFloat32:
        return from(static_cast<float*>(nullptr));
      case DType::kFloat64:
        return from(static_cast<double*>(nullptr));
      case DType::kFloat16:
        return from(static_cast<Float16*>(nullptr));
      case DType::kBFloat16:
        return from(static_cast<BFloat16*>(nullptr));
      case DType::kBool:
        return from(static_cast<uint8_t*>(nullptr));
      case DType::kInt32:
        return from(static_cast<int32_t*>(nullptr));
      case DType::kInt64:
        return from(static_cast<int64_t*>(nullptr));
    }
  }

  // --- numbers ---

  void compute(const PairInstruction& x) {
    Real* const out = real(x.out);
    const Real *const a = real(x.arg[0]), *const b = real(x.arg[1]);
    const V one = V::set1(1);
    switch (x.operation) {
      case Operation::k_add:
        return each(out, [&](int n) { return a[n] + b[n]; });
      case Operation::k_sub:
        return each(out, [&](int n) { return a[n] - b[n]; });
      case Operation::k_mul:
        return each(out, [&](int n) { return a[n] * b[n]; });
      case Operation::k_div:
        return each(out, [&](int n) { return a[n] / b[n]; });
      // A NaN of either stays one, as in torch.
      case Operation::k_max:
        return each(out, [&](int n) { return a[n] > b[n] || a[n] != a[n] ? a[n] : b[n]; });
      case Operation::k_min:
        return each(out, [&](int n) { return a[n] < b[n] || a[n] != a[n] ? a[n] : b[n]; });
      case Operation::k_pow:
        return each(out, [&](int n) { return std::pow(a[n], b[n]); });
      case Operation::k_neg:
        return each(out, [&](int n) { return -a[n]; });
      case Operation::k_abs:
        return each(out, [&](int n) { return std::fabs(a[n]); });
      case Operation::k_sign:
        return each(out, [&](int n) { return Real(a[n] > 0) - Real(a[n] < 0); });
      case Operation::k_floor:
        return each(out, [&](int n) { return std::floor(a[n]); });
      case Operation::k_ceil:
        return each(out, [&](int n) { return std::ceil(a[n]); });
      case Operation::k_trunc:
        return each(out, [&](int n) { return std::trunc(a[n]); });
      case Operation::k_sqrt:
        return each(out, [&](int n) { return std::sqrt(a[n]); });
      case Operation::k_exp:
        return each_vector(out, a, [](V v) { return whole_exp(v); });
      case Operation::k_log:
        return each(out, [&](int n) { return std::log(a[n]); });
      case Operation::k_log1p:
        return each(out, [&](int n) { return std::log1p(a[n]); });
      case Operation::k_expm1:
        return each(out, [&](int n) { return std::expm1(a[n]); });
      case Operation::k_sin:
        return each(out, [&](int n) { return std::sin(a[n]); });
      case Operation::k_cos:
        return each(out, [&](int n) { return std::cos(a[n]); });
      case Operation::k_tanh:
        return each_vector(out, a, [](V v) { return tanh(v); });
      case Operation::k_sigmoid:
        return each_vector(out, a, [&](V v) { return one / (one + whole_exp(V::zero() - v)); });
      case Operation::k_erf:
        return each(out, [&](int n) { return std::erf(a[n]); });
      case Operation::k_to_float32:
        return each(out, [&](int n) { return static_cast<Real>(static_cast<float>(a[n])); });
      default:
        return compute_mixed(x);
    }
  }

  // Both are read, so that no load waits for the choice.
  template <class T>
  static FUSED_ATTN_INLINE T chosen(Int which, T yes, T no) {
    return which != 0 ? yes : no;
  }

  // e^x of any x.
  static FUSED_ATTN_INLINE V whole_exp(V x) {
    return exp(min(V::set1(Real(2000)), max(V::set1(Real(-2000)), x)));
  }

  // Numbers of truths, and truths of numbers.
  void compute_mixed(const PairInstruction& x) {
    const Real *const a = real(x.arg[0]), *const b = real(x.arg[1]);
    Int* const truth = integer(x.out);
    switch (x.operation) {
      case Operation::k_from_int: {
        const Int* from = integer(x.arg[0]);
        return each(real(x.out), [&](int n) { return static_cast<Real>(from[n]); });
      }
      case Operation::k_select: {
        const Int* which = integer(x.arg[0]);
        const Real *const yes = real(x.arg[1]), *const no = real(x.arg[2]);
        return each(real(x.out), [&](int n) { return chosen(which[n], yes[n], no[n]); });
      }
      case Operation::k_lt:
        return each(truth, [&](int n) { return Int(a[n] < b[n]); });
      case Operation::k_le:
        return each(truth, [&](int n) { return Int(a[n] <= b[n]); });
      case Operation::k_gt:
        return each(truth, [&](int n) { return Int(a[n] > b[n]); });
      case Operation::k_ge:
        return each(truth, [&](int n) { return Int(a[n] >= b[n]); });
      case Operation::k_eq:
        return each(truth, [&](int n) { return Int(a[n] == b[n]); });
      default:
        return each(truth, [&](int n) { return Int(a[n] != b[n]); });
    }
  }

  // --- whole numbers; Python has made sure that none overflows and no divisor is 0 ---

  void compute_int(const PairInstruction& x) {
    Int* const out = integer(x.out);
    const Int *const a = integer(x.arg[0]), *const b = integer(x.arg[1]);
    switch (x.operation) {
      case Operation::k_add_int:
        return each(out, [&](int n) { return a[n] + b[n]; });
      case Operation::k_sub_int:
        return each(out, [&](int n) { return a[n] - b[n]; });
      case Operation::k_mul_int:
        return each(out, [&](int n) { return a[n] * b[n]; });
      case Operation::k_floor_div_int:
        return each(out, [&](int n) { return a[n] / b[n] - below(a[n], b[n]); });
      case Operation::k_trunc_div_int:
        return each(out, [&](int n) { return a[n] / b[n]; });
      case Operation::k_remainder_int:
        return each(out, [&](int n) { return a[n] % b[n] + below(a[n], b[n]) * b[n]; });
      case Operation::k_max_int:
        return each(out, [&](int n) { return a[n] > b[n] ? a[n] : b[n]; });
      case Operation::k_min_int:
        return each(out, [&](int n) { return a[n] < b[n] ? a[n] : b[n]; });
      case Operation::k_neg_int:
        return each(out, [&](int n) { return -a[n]; });
      case Operation::k_abs_int:
        return each(out, [&](int n) { return a[n] < 0 ? -a[n] : a[n]; });
      case Operation::k_sign_int:
        return each(out, [&](int n) { return Int(a[n] > 0) - Int(a[n] < 0); });
      case Operation::k_and_int:
        return each(out, [&](int n) { return a[n] & b[n]; });
      case Operation::k_or_int:
        return each(out, [&](int n) { return a[n] | b[n]; });
      case Operation::k_xor_int:
        return each(out, [&](int n) { return a[n] ^ b[n]; });
      case Operation::k_select_int: {
        const Int* no = integer(x.arg[2]);
        return each(out, [&](int n) { return chosen(a[n], b[n], no[n]); });
      }
      case Operation::k_lt_int:
        return each(out, [&](int n) { return Int(a[n] < b[n]); });
      case Operation::k_le_int:
        return each(out, [&](int n) { return Int(a[n] <= b[n]); });
      case Operation::k_gt_int:
        return each(out, [&](int n) { return Int(a[n] > b[n]); });
      case Operation::k_ge_int:
        return each(out, [&](int n) { return Int(a[n] >= b[n]); });
      case Operation::k_eq_int:
        return each(out, [&](int n) { return Int(a[n] == b[n]); });
      default:
        return each(out, [&](int n) { return Int(a[n] != b[n]); });
    }
  }

  // 1 where division rounds to 0 and the floor is one below.
  static FUSED_ATTN_INLINE Int below(Int a, Int b) {
    return Int(a % b != 0) & Int((a < 0) != (b < 0));
  }

  // --- gradients of leaves, always added in the order of blocks, tiles, keys ---

  template <class T>
  T* gradient(const PairInstruction& x, int64_t place) const {
    return at<T>(functions_->leaves[x.leaf].gradient, batch_, head_, place);
  }

  void sum_up(const PairInstruction& x, const Strip<Real>& strip) {
    const Real* from = real(x.arg[0]);
    switch (x.operation) {
      case Operation::k_sum_one: {
        V total = V::zero();
        for (int n = 0; n < count_; n += kLanes) total = total + V::load(from + n);
        *gradient<double>(x, 0) += static_cast<double>(sum(total));
        return;
      }
      case Operation::k_sum_query: {
        Real* to = gradient<Real>(x, first_);
        for (int q = 0; q < rows_; ++q) {
          Real total = 0;
          for (int c = 0; c < strip.keys; ++c) total += from[c * width_ + q];
          to[q] += total;
        }
        return;
      }
      case Operation::k_sum_key: {
        Real* to = gradient<Real>(x, strip.key);
        for (int c = 0; c < strip.keys; ++c) {
          V total = V::zero();
          for (int q = 0; q < width_; q += kLanes) total = total + V::load(from + c * width_ + q);
          to[c] += sum(total);
        }
        return;
      }
      case Operation::k_sum_distance: {
        Real* to = gradient<Real>(x, distance(strip.key));
        for (int c = 0; c < strip.keys; ++c, --to) {
          for (int q = 0; q < rows_; ++q) to[q] += from[c * width_ + q];
        }
        return;
      }
      default:
        return scatter(x);
    }
  }

  void scatter(const PairInstruction& x) const {
    const Real* from = real(x.out);  // the arguments are its indices
    PairLeaf table = functions_->leaves[x.leaf];
    Real* to = static_cast<Real*>(table.gradient.data) + batch_ * table.gradient_batch +
               head_ * table.gradient_head;
    std::memcpy(table.view.stride, table.gradient.stride, sizeof table.view.stride);
    // Lanes past the last query repeat its index and add 0.
    for_each_index(x, table, [&](int n, int64_t offset) { to[offset] += from[n]; });
  }

  const PairFunctions* functions_ = nullptr;
  PairProgram program_;
  std::vector<MachineLeaf> leaves_;  // of machine code
  int64_t batch_ = 0, head_ = 0, seqlen_k_ = 0;
  Real scale_ = 1;
  Real* reals_ = nullptr;
  Int* ints_ = nullptr;
  int64_t first_ = 0;  // query
  int rows_ = 0;
  int width_ = kBlockQ;
  int count_ = kStrip;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
