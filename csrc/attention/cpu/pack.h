// Moves rows of tensors into the form that the products want, and results back.
#pragma once

#include <type_traits>

#include "attention/cpu/prefetch.h"
#include "attention/cpu/visibility.h"
#include "cpu/parallel.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// Rows of a matrix, in units. Row 0 may lie outside of what was allocated: only the rows that were
// asked for may be read.
template <class E>
struct UnitRows {
  const typename E::Unit* data;
  int64_t stride;

  FUSED_ATTN_INLINE const typename E::Unit* row(int64_t i) const { return data + i * stride; }
};

// One head of one sequence in a tensor.
struct HeadView {
  const View4& view;
  int64_t batch;  // 0 for packed problems
  int64_t head;
  int64_t first;    // row
  int64_t columns;  // head_dim or head_dim_v

  template <class T>
  FUSED_ATTN_INLINE T* row(int64_t i) const {
    return at<T>(view, batch, head, first + i);
  }
  int64_t stride_row() const { return view.stride[2]; }
  int64_t stride_column() const { return view.stride[3]; }
};

FUSED_ATTN_INLINE HeadView query_view(const Params& p, const View4& view, const Sequence& s,
                                      int64_t head, int64_t columns) {
  return {view, p.cu_seqlens_q == nullptr ? s.batch : 0, head, s.first_q, columns};
}
FUSED_ATTN_INLINE HeadView key_view(const Params& p, const View4& view, const Sequence& s,
                                    int64_t head, int64_t columns) {
  return {view, p.cu_seqlens_k == nullptr ? s.batch : 0, head / (p.num_heads / p.num_heads_kv),
          s.first_k, columns};
}

// The rows [begin, end) of x, to prefetch; none if it is absent or its columns are scattered.
template <class Real>
inline ByteRows byte_rows(const HeadView& x, int64_t begin, int64_t end) {
  ByteRows rows;
  if (x.view.data == nullptr || begin >= end) return rows;
  if (x.stride_column() != 1 && x.columns != 1) return rows;
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    rows = byte_rows(x.row<const T>(begin), x.stride_row(), x.columns, end - begin);
  });
  return rows;
}

template <class E>
inline bool in_place(const HeadView& x) {
  bool same = false;
  with_dtype<typename E::Real>(
      x.view.dtype, [&](auto* tag) { same = std::is_same_v<decltype(tag), typename E::Element*>; });
  return same && (x.stride_column() == 1 || x.columns == 1) &&
         (E::kPair == 1 || (x.columns % E::kPair == 0 && x.stride_row() % E::kPair == 0));
}

// Copies row i of x to `to`, converted; columns beyond the last become 0 up to `width`.
template <class E>
inline void copy_row(const HeadView& x, int64_t i, int64_t width, typename E::Element* to) {
  using Element = typename E::Element;
  using Real = typename E::Real;
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* from = x.row<const T>(i);
    const int64_t stride = x.stride_column();
    if constexpr (std::is_same_v<T, Element>) {
      if (stride == 1) {
        std::memcpy(to, from, sizeof(T) * static_cast<size_t>(x.columns));
      } else {
        for (int64_t d = 0; d < x.columns; ++d) to[d] = from[d * stride];
      }
    } else if constexpr (sizeof(Element) == 4) {
      int64_t d = 0;
      if (stride == 1) {
        for (; d + kLanes <= x.columns; d += kLanes) load_as<Real>(from + d, kLanes).store(to + d);
      }
      for (; d < x.columns; ++d) to[d] = to_real<Real>(from[d * stride]);
    }
  });
  if (width > x.columns) {
    std::memset(static_cast<void*>(to + x.columns), 0,
                sizeof(Element) * static_cast<size_t>(width - x.columns));
  }
}

// The rows [range.begin, range.end) of x in units along the columns; `width` >= columns pads with
// zeros. `keep` (by row, may be null) says which rows to use; the others become 0 and are not read.
template <class E>
inline UnitRows<E> prepare_rows(const HeadView& x, KeyRange range, const uint8_t* keep,
                                Buffer& buffer, int64_t width) {
  using Element = typename E::Element;
  using Unit = typename E::Unit;
  if (keep == nullptr && width == x.columns && in_place<E>(x)) {
    return {reinterpret_cast<const Unit*>(x.row<Element>(0)), x.stride_row() / E::kPair};
  }
  const int64_t stride = units<E>(width);
  const int64_t padded = stride * E::kPair;
  Element* to = buffer.get<Element>(range.end * padded);
  for (int64_t i = range.begin; i < range.end; ++i) {
    if (keep == nullptr || keep[i]) {
      copy_row<E>(x, i, padded, to + i * padded);
    } else {
      std::memset(static_cast<void*>(to + i * padded), 0,
                  sizeof(Element) * static_cast<size_t>(padded));
    }
  }
  return {reinterpret_cast<const Unit*>(to), stride};
}
template <class E>
inline UnitRows<E> prepare_rows(const HeadView& x, KeyRange range, const uint8_t* keep,
                                Buffer& buffer) {
  return prepare_rows<E>(x, range, keep, buffer, x.columns);
}

inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t columns, uint32_t* to) {
  for (int64_t d = 0; d < columns; ++d) to[d] = even[d].bits | uint32_t{odd[d].bits} << 16;
}

// The same rows in units across rows: with pairs, row u of the result holds rows 2u and 2u + 1.
// `width` >= columns pads with zeros.
template <class E>
inline UnitRows<E> prepare_pairs(const HeadView& x, KeyRange range, const uint8_t* keep,
                                 int64_t width, Buffer& buffer, Buffer& rows_buffer) {
  if constexpr (E::kPair == 1) {
    (void)rows_buffer;
    return prepare_rows<E>(x, range, keep, buffer, width);
  } else {
    using Element = typename E::Element;
    auto* to = buffer.get<uint32_t>(units<E>(range.end) * width);
    auto* spare = rows_buffer.get<Element>(2 * width);
    const bool direct = x.stride_column() == 1 && width == x.columns;
    auto source = [&](int64_t i, Element* copy) -> const Element* {
      const bool use = i >= range.begin && i < range.end && (keep == nullptr || keep[i]);
      if (use && direct) return x.row<const Element>(i);
      if (use) {
        copy_row<E>(x, i, width, copy);
      } else {
        std::memset(static_cast<void*>(copy), 0, sizeof(Element) * static_cast<size_t>(width));
      }
      return copy;
    };
    for (int64_t u = range.begin / 2; u < units<E>(range.end); ++u) {
      const Element* even = source(2 * u, spare);
      const Element* odd = source(2 * u + 1, spare + width);
      interleave(even, odd, width, to + u * width);
    }
    return {to, width};
  }
}

// The rows of x as the A of a product of form kOfColumns: [pair of keys][column] as prepare_pairs
// makes it, or, for tiles, [column][pair of keys].
template <class E>
class ColumnRows {
 public:
  ColumnRows() = default;
  explicit ColumnRows(UnitRows<E> numbers) : pairs_(numbers) {}  // where a unit is a number
  ColumnRows(const HeadView& x, KeyRange range, const uint8_t* keep, Buffer& buffer, Buffer& rows,
             Buffer& turned) {
    pairs_ = prepare_pairs<E>(x, range, keep, x.columns, buffer, rows);
    if constexpr (E::kTiles) turn(x.columns, range, turned);
  }

  // From key j on, which begins a unit.
  FUSED_ATTN_INLINE const typename E::Unit* from(int64_t j) const {
    return E::kTiles ? pairs_.data + j / E::kPair : pairs_.row(j / E::kPair);
  }
  FUSED_ATTN_INLINE int64_t stride() const { return pairs_.stride; }

 private:
  void turn(int64_t columns, KeyRange range, Buffer& buffer) {
    using Real = typename E::Real;  // as wide as a unit
    const int64_t begin = range.begin / E::kPair, end = units<E>(range.end);
    // Rows an odd number of cache lines apart: the 16 of a tile lie in as many sets of the cache.
    const int64_t stride = (ceil_div(end, kLanes) | 1) * kLanes;
    Real* to = buffer.get<Real>(columns * stride);
    const auto* from = reinterpret_cast<const Real*>(pairs_.data);
    for (int64_t u = begin; u < end; u += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(end - u, kLanes));
      for (int64_t d = 0; d < columns; d += kLanes) {
        const int width = static_cast<int>(smaller<int64_t>(columns - d, kLanes));
        Vec<Real> block[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          block[r] = r < count ? Vec<Real>::load(from + (u + r) * pairs_.stride + d, width)
                               : Vec<Real>::zero();
        }
        transpose(block);
        for (int c = 0; c < width; ++c) block[c].store(to + (d + c) * stride + u, count);
      }
    }
    pairs_ = {reinterpret_cast<const typename E::Unit*>(to), stride};
  }

  UnitRows<E> pairs_{nullptr, 0};
};

// Transposes n <= kBlockQ rows: to[unit][query]; queries up to the next multiple of 16 become 0.
template <class E>
inline void pack_columns(UnitRows<E> rows, int n, int64_t columns, typename E::Unit* to) {
  using Real = typename E::Real;  // as wide as a unit
  const auto* from = reinterpret_cast<const Real*>(rows.data);
  for (int q = 0; q < n; q += kLanes) {
    const int count = smaller(n - q, kLanes);
    for (int64_t u = 0; u < columns; u += kLanes) {
      const int width = static_cast<int>(smaller<int64_t>(columns - u, kLanes));
      Vec<Real> block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const Real* row = from + (q + r) * rows.stride + u;
        block[r] = r >= count        ? Vec<Real>::zero()
                   : width == kLanes ? Vec<Real>::load(row)
                                     : Vec<Real>::load(row, width);
      }
      transpose(block);
      auto* column = reinterpret_cast<Real*>(to) + u * kStrideQ + q;
      for (int c = 0; c < width; ++c) block[c].store(column + c * kStrideQ);
    }
  }
}

// Writes from[column][query] * factor[query] to the first n rows of x.
template <class Real>
inline void write_columns(const Real* from, const Real* factor, int n, const HeadView& x) {
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t stride = x.stride_column();
    for (int q = 0; q < n; q += kLanes) {
      const int count = smaller(n - q, kLanes);
      const auto scale = Vec<Real>::load(factor + q);
      for (int64_t d = 0; d < x.columns; d += kLanes) {
        const int width = static_cast<int>(smaller<int64_t>(x.columns - d, kLanes));
        Vec<Real> block[kLanes];
        for (int c = 0; c < kLanes; ++c) {
          block[c] = c < width ? Vec<Real>::load(from + (d + c) * kStrideQ + q) * scale
                               : Vec<Real>::zero();
        }
        transpose(block);
        for (int r = 0; r < count; ++r) {
          T* to = x.row<T>(q + r) + d * stride;
          if (stride == 1) {
            store_as<Real>(to, block[r], width);
          } else {
            alignas(64) Real lanes[kLanes];
            block[r].store(lanes);
            for (int c = 0; c < width; ++c) from_real(lanes[c], to + c * stride);
          }
        }
      }
    }
  });
}

// Writes from[row][column] * factor to the rows [range.begin, range.end) of x; row 0 of `from` goes
// to the first of them.
template <class Real>
inline void write_rows(const Real* from, int64_t width, Real factor, const HeadView& x,
                       KeyRange range) {
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto scale = Vec<Real>::set1(factor);
    const int64_t stride = x.stride_column();
    for (int64_t i = range.begin; i < range.end; ++i, from += width) {
      T* row = x.row<T>(i);
      for (int64_t d = 0; d < x.columns; d += kLanes) {
        const int count = static_cast<int>(smaller<int64_t>(x.columns - d, kLanes));
        if (stride == 1) {
          store_as<Real>(row + d, Vec<Real>::load(from + d) * scale, count);
        } else {
          for (int c = 0; c < count; ++c) {
            from_real(from[d + c] * factor, row + (d + c) * stride);
          }
        }
      }
    }
  });
}

template <class Real>
inline void zero_rows(const HeadView& x, KeyRange range) {
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for (int64_t i = range.begin; i < range.end; ++i) {
      for (int64_t d = 0; d < x.columns; ++d) x.row<T>(i)[d * x.stride_column()] = T{};
    }
  });
}

// Is any number in these rows infinite or NaN?
template <class Real>
inline bool any_nonfinite(const HeadView& x, KeyRange range) {
  bool found = false;
  with_dtype<Real>(x.view.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    constexpr Bits kExponent = std::is_same_v<T, float>      ? Bits(0x7f800000u)
                               : std::is_same_v<T, BFloat16> ? Bits(0x7f80u)
                               : std::is_same_v<T, Float16>  ? Bits(0x7c00u)
                                                             : Bits(0x7ff0000000000000u);
    for (int64_t i = range.begin; i < range.end && !found; ++i) {
      const T* row = x.row<const T>(i);
      Bits bad = 0;
      if (x.stride_column() == 1) {
        for (int64_t d = 0; d < x.columns; ++d) {
          bad |= (bits_as<Bits>(row[d]) & kExponent) == kExponent ? Bits(1) : Bits(0);
        }
      } else {
        for (int64_t d = 0; d < x.columns; ++d) {
          const Bits bits = bits_as<Bits>(row[d * x.stride_column()]);
          bad |= (bits & kExponent) == kExponent ? Bits(1) : Bits(0);
        }
      }
      found = bad != 0;
    }
  });
  return found;
}

// Which keys does any query of this head see, the bias's -inf included? nullptr if it does not
// matter: a probability of 0 wipes out what a hidden key holds, unless that is infinite or NaN.
template <class Real>
inline const uint8_t* keys_to_keep(const Params& p, const Sequence& s, int64_t head,
                                   const Visibility& visibility, Buffer& buffer) {
  if (!visibility.has_holes() && p.bias.data == nullptr) return nullptr;
  const KeyRange range = visibility.keys();
  if (!any_nonfinite<Real>(key_view(p, p.k, s, head, p.head_dim), range) &&
      !any_nonfinite<Real>(key_view(p, p.v, s, head, p.head_dim_v), range)) {
    return nullptr;
  }
  uint8_t* keep = buffer.get<uint8_t>(range.end);
  auto hidden_by_bias = [&](int64_t i, int64_t j) {
    bool hidden = false;
    if (p.bias.data == nullptr) return hidden;
    with_bias_dtype<Real>(p.bias.dtype, [&](auto* tag) {
      using T = std::remove_pointer_t<decltype(tag)>;
      hidden = to_real<double>(*at<const T>(p.bias, s.batch, head, i, j)) == -HUGE_VAL;
    });
    return hidden;
  };
  for (int64_t j = range.begin; j < range.end; ++j) {
    keep[j] = 0;
    for (int64_t i = 0; i < s.seqlen_q && !keep[j]; ++i) {
      keep[j] = visibility.visible(i, j) && !hidden_by_bias(i, j);
    }
  }
  return keep;
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
