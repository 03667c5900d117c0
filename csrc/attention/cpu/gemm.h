// The two matrix products that attention is made of, over operands that fit the caches.
//
//   kRows:     C[r][lane] = sum over k of A[r][k] B[k][lane]   K Q^T, V dO^T, P^T dO, dS^T Q
//   kColumns:  C[r][lane] = sum over k of A[k][r] B[k][lane]   V^T P^T, K^T dS^T
//
// Lanes are the last dimension of B and C and lie in vectors; numbers of A are broadcast from where
// they are, so A is never packed. A tile of C stays in registers for the whole depth.
#pragma once

#include "attention/cpu/engine.h"
#include "attention/cpu/prefetch.h"
#if FUSED_ATTN_BF16_TILES
#include "cpu/tiles_amx.h"
#endif

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

enum class Form { kRows, kColumns };

// The form of V^T P^T and K^T dS^T. Tiles read A by rows alone, so there A is transposed beforehand
// (ColumnRows in pack.h).
template <class E>
constexpr Form kOfColumns = E::kTiles ? Form::kRows : Form::kColumns;

// What a thread needs around the products of a head.
#if FUSED_ATTN_BF16_TILES
using ProductRegisters = TileRegisters;
#else
struct ProductRegisters {};
#endif

template <class E>
struct Product {
  using Unit = typename E::Unit;
  using Real = typename E::Real;
  const Unit* a;
  int64_t stride_a;  // between rows of A, in units
  const Unit* b;
  int64_t stride_b;
  Real* c;
  int64_t stride_c;
  int64_t rows;     // of C
  int64_t depth;    // in units
  int group_begin;  // of lanes, to group_end
  int group_end;
};

// C = product
struct Overwrite {
  template <class Real, int R, int G>
  FUSED_ATTN_INLINE void operator()(Real* c, int64_t stride, int, Vec<Real> (&acc)[R][G]) const {
    FUSED_ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      FUSED_ATTN_UNROLL
      for (int g = 0; g < G; ++g) acc[r][g].store(c + r * stride + g * kLanes);
    }
  }
};

// C += product
struct Accumulate {
  template <class Real, int R, int G>
  FUSED_ATTN_INLINE void operator()(Real* c, int64_t stride, int, Vec<Real> (&acc)[R][G]) const {
    FUSED_ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      FUSED_ATTN_UNROLL
      for (int g = 0; g < G; ++g) {
        Real* to = c + r * stride + g * kLanes;
        (Vec<Real>::load(to) + acc[r][g]).store(to);
      }
    }
  }
};

// C = factor[lane] * C + product
template <class Real>
struct ScaleAndAccumulate {
  const Real* factor;
  template <int R, int G>
  FUSED_ATTN_INLINE void operator()(Real* c, int64_t stride, int lane,
                                    Vec<Real> (&acc)[R][G]) const {
    FUSED_ATTN_UNROLL
    for (int g = 0; g < G; ++g) {
      const auto scale = Vec<Real>::load(factor + lane + g * kLanes);
      FUSED_ATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        Real* to = c + r * stride + g * kLanes;
        fma(Vec<Real>::load(to), scale, acc[r][g]).store(to);
      }
    }
  }
};

// C = product, largest[lane] = max(largest[lane], product)
template <class Real>
struct OverwriteAndMax {
  Real* largest;
  template <int R, int G>
  FUSED_ATTN_INLINE void operator()(Real* c, int64_t stride, int lane,
                                    Vec<Real> (&acc)[R][G]) const {
    Overwrite{}(c, stride, lane, acc);
    FUSED_ATTN_UNROLL
    for (int g = 0; g < G; ++g) {
      Real* m = largest + lane + g * kLanes;
      auto column = acc[0][g];
      FUSED_ATTN_UNROLL
      for (int r = 1; r < R; ++r) column = max(column, acc[r][g]);
      max(Vec<Real>::load(m), column).store(m);
    }
  }
};

// The epilogue, and then a prefetch of what is needed later.
template <class Epilogue>
struct ThenPrefetch {
  Epilogue epilogue;
  HeadPrefetcher& prefetcher;

  template <class Real, int R, int G>
  FUSED_ATTN_INLINE void operator()(Real* c, int64_t stride, int lane,
                                    Vec<Real> (&acc)[R][G]) const {
    epilogue(c, stride, lane, acc);
    prefetcher.step();
  }
};

template <class Epilogue>
FUSED_ATTN_INLINE ThenPrefetch<Epilogue> then_prefetch(const Epilogue& epilogue,
                                                       HeadPrefetcher& prefetcher) {
  return {epilogue, prefetcher};
}

template <class Unit>
FUSED_ATTN_INLINE Vec<Unit> broadcast(const Unit* from) {
  Unit unit;
  std::memcpy(&unit, from, sizeof(unit));  // pairs of bfloat16 need not be aligned
  return Vec<Unit>::set1(unit);
}

// acc += the products of `depth` units from a and b on, which move along.
template <class E, Form kForm, int R, int G>
FUSED_ATTN_INLINE void accumulate(const Product<E>& x, int64_t depth, const typename E::Unit*& a,
                                  const typename E::Unit*& b, Vec<typename E::Real> (&acc)[R][G]) {
  using Unit = typename E::Unit;
  const int64_t stride_row = kForm == Form::kRows ? x.stride_a : 1;
  const int64_t stride_depth = kForm == Form::kRows ? 1 : x.stride_a;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Unit> lanes[G];
    FUSED_ATTN_UNROLL
    for (int g = 0; g < G; ++g) lanes[g] = Vec<Unit>::load(b + g * kLanes);
    FUSED_ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<Unit> number = broadcast(a + r * stride_row);
      FUSED_ATTN_UNROLL
      for (int g = 0; g < G; ++g) acc[r][g] = E::dot(number, lanes[g], acc[r][g]);
    }
    a += stride_depth;
    b += x.stride_b;
  }
}

template <class Real, int R, int G>
FUSED_ATTN_INLINE void clear(Vec<Real> (&acc)[R][G]) {
  FUSED_ATTN_UNROLL
  for (int r = 0; r < R; ++r) {
    FUSED_ATTN_UNROLL
    for (int g = 0; g < G; ++g) acc[r][g] = Vec<Real>::zero();
  }
}

// A sum that runs over more units than kLongestChain is made of parts of kChain: its rounding error
// grows with the number of additions one after the other.
constexpr int64_t kLongestChain = 192;
constexpr int64_t kChain = 128;

template <class E, Form kForm, int R, int G>
FUSED_ATTN_NOINLINE void multiply_deep_tile(const Product<E>& x, const typename E::Unit* a,
                                            const typename E::Unit* b, typename E::Real* to) {
  using V = Vec<typename E::Real>;
  for (int64_t done = 0; done < x.depth; done += kChain) {
    V acc[R][G];
    clear(acc);
    accumulate<E, kForm>(x, smaller(kChain, x.depth - done), a, b, acc);
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) {
        typename E::Real* at = to + (r * G + g) * kLanes;
        (done == 0 ? acc[r][g] : V::load(at) + acc[r][g]).store(at);
      }
    }
  }
}

template <class E, Form kForm, int R, int G, class Epilogue>
FUSED_ATTN_INLINE void multiply_tile(const Product<E>& x, int64_t row, int group,
                                     const Epilogue& epilogue) {
  using Real = typename E::Real;
  const typename E::Unit* a = x.a + row * (kForm == Form::kRows ? x.stride_a : 1);
  const typename E::Unit* b = x.b + group * kLanes;
  Vec<Real> acc[R][G];
  if (x.depth <= kLongestChain) {
    clear(acc);
    accumulate<E, kForm>(x, x.depth, a, b, acc);
  } else {
    alignas(64) Real sums[R * G * kLanes];
    multiply_deep_tile<E, kForm, R, G>(x, a, b, sums);
    FUSED_ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      FUSED_ATTN_UNROLL
      for (int g = 0; g < G; ++g) acc[r][g] = Vec<Real>::load(sums + (r * G + g) * kLanes);
    }
  }
  epilogue(x.c + row * x.stride_c + group * kLanes, x.stride_c, group * kLanes, acc);
}

// Tiles of R rows while they fit, then of half as many. After six come four: two tiles of them take
// the place of one of six and one of two, which has too few accumulators.
template <class E, Form kForm, int R, int G, class Epilogue>
FUSED_ATTN_INLINE void multiply_rows(const Product<E>& x, int64_t row, int group,
                                     const Epilogue& epilogue) {
  constexpr int kNext = R == 6 ? 4 : R / 2;
  const int64_t end = R == 6 && x.rows % R == 2 ? x.rows - (R + 2) : x.rows;
  for (; row + R <= end; row += R) multiply_tile<E, kForm, R, G>(x, row, group, epilogue);
  if constexpr (R > 1) {
    if (row < x.rows) multiply_rows<E, kForm, kNext, G>(x, row, group, epilogue);
  }
}

// Registers decide the tile: its accumulators, one vector of B per group and one of A. Eight or
// more accumulators hide the latency of two multiply-adds a cycle.
template <class Real>
struct RegisterTile {
  static constexpr int kVectors = kRegisterVectors<Real>;
  static constexpr int kMaxGroups = kVectors >= 32 ? 4 : kVectors >= 16 ? 2 : 1;
  static constexpr int rows(int groups) {
    if (kVectors < 16) return kVectors >= 8 ? 6 : kVectors / 2;
    return kVectors < 32 ? 4 : groups > 2 ? 6 : 8;
  }
};

// About how many tiles a product of all queries of a block comes in.
template <class Real>
inline int64_t product_tiles(int queries, int64_t rows) {
  using Size = RegisterTile<Real>;
  const int groups = static_cast<int>(ceil_div(queries, kLanes));
  const int together = smaller(groups, Size::kMaxGroups);
  return ceil_div(rows, Size::rows(together)) * ceil_div(groups, together);
}

#if FUSED_ATTN_BF16_TILES
// The products by tiles, rows that are no whole tile with some of those before them: a tile reads
// 16 rows, and behind the last there may be nothing. What is left of the depth follows by dots.
template <class E, int G, class Epilogue>
FUSED_ATTN_INLINE void multiply_by_tiles(const Product<E>& x, int group, const Epilogue& epilogue) {
  using Real = typename E::Real;
  const int64_t steps = x.depth / kTileUnits, rest = x.depth % kTileUnits;
  const typename E::Unit* b = x.b + group * kLanes;
  alignas(64) Real sums[kTileRows * G * kLanes];
  const auto rows = [&](auto count, int64_t row, const Real* from) {
    constexpr int R = decltype(count)::value;
    Vec<Real> acc[R][G];
    FUSED_ATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      FUSED_ATTN_UNROLL
      for (int g = 0; g < G; ++g) acc[r][g] = Vec<Real>::load(from + (r * G + g) * kLanes);
    }
    if (rest != 0) {
      const typename E::Unit* a_rest = x.a + row * x.stride_a + steps * kTileUnits;
      const typename E::Unit* b_rest = b + steps * kTileUnits * x.stride_b;
      accumulate<E, Form::kRows>(x, rest, a_rest, b_rest, acc);
    }
    epilogue(x.c + row * x.stride_c + group * kLanes, x.stride_c, group * kLanes, acc);
  };
  for (int64_t done = 0; done < x.rows; done += kTileRows) {
    const int64_t first = smaller(done, x.rows - kTileRows), end = first + kTileRows;
    multiply_tiles<G>(x.a + first * x.stride_a, x.stride_a, b, x.stride_b, steps, sums);
    const Real* from = sums + (done - first) * G * kLanes;
    int64_t row = done;
    for (; row + 4 <= end; row += 4, from += 4 * G * kLanes) {
      rows(std::integral_constant<int, 4>{}, row, from);
    }
    for (; row < end; ++row, from += G * kLanes) {
      rows(std::integral_constant<int, 1>{}, row, from);
    }
  }
}

template <class E, class Epilogue>
void multiply_by_tiles(const Product<E>& x, const Epilogue& epilogue) {
  for (int group = x.group_begin; group < x.group_end; group += 4) {
    const int count = smaller(x.group_end - group, 4);
    if (count == 4) multiply_by_tiles<E, 4>(x, group, epilogue);
    if (count == 3) multiply_by_tiles<E, 3>(x, group, epilogue);
    if (count == 2) multiply_by_tiles<E, 2>(x, group, epilogue);
    if (count == 1) multiply_by_tiles<E, 1>(x, group, epilogue);
  }
}
#endif

template <class E, Form kForm, class Epilogue>
void multiply(const Product<E>& x, const Epilogue& epilogue) {
  using Size = RegisterTile<typename E::Real>;
#if FUSED_ATTN_BF16_TILES
  if constexpr (E::kTiles && kForm == Form::kRows) {
    if (x.rows >= kTileRows && x.depth >= kTileUnits && x.depth <= kLongestChain) {
      return multiply_by_tiles(x, epilogue);
    }
  }
#endif
  int group = x.group_begin;
  while (group < x.group_end) {
    const int count = smaller(x.group_end - group, Size::kMaxGroups);
    if constexpr (Size::kMaxGroups >= 4) {
      if (count == 4) multiply_rows<E, kForm, Size::rows(4), 4>(x, 0, group, epilogue);
      if (count == 3) multiply_rows<E, kForm, Size::rows(3), 3>(x, 0, group, epilogue);
    }
    if constexpr (Size::kMaxGroups >= 2) {
      if (count == 2) multiply_rows<E, kForm, Size::rows(2), 2>(x, 0, group, epilogue);
    }
    if (count == 1) multiply_rows<E, kForm, Size::rows(1), 1>(x, 0, group, epilogue);
    group += count;
  }
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
