// An operand of a product, and how its numbers come into the order in which a tile reads them.
#pragma once

#include "cpu/engine.h"
#include "cpu/rows.h"

namespace fused_attn::linear::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

// A matrix (i, k) whose second index is summed over: rows as they are, or columns of them.
template <class T>
struct Operand {
  const T* data;
  const Dims& index;
  const Dims& depth;

  const T* at(int64_t i, int64_t k) const { return data + index.offset(i) + depth.offset(k); }
};

template <class T>
Operand<T> by_rows(const Rows& rows) {
  return {static_cast<const T*>(rows.data), rows.outer, rows.inner};
}
template <class T>
Operand<T> by_columns(const Rows& rows) {
  return {static_cast<const T*>(rows.data), rows.inner, rows.outer};
}

// to[k][lane] = x(first + lane, k) for the `depth` numbers from `begin` on; lanes from `count` on
// are 0.
template <class T>
void pack_lanes(const Operand<T>& x, int64_t first, int count, int64_t begin, int64_t depth,
                float* to, int64_t stride) {
  if (x.index.dense()) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = x.at(first, begin + k);
      (count == kLanes ? load(from) : load(from, count)).store(to + k * stride);
    }
    return;
  }
  if (x.depth.dense()) {
    const T* from[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      from[lane] = x.at(first + (lane < count ? lane : 0), begin);
    }
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int width = static_cast<int>(smaller<int64_t>(kLanes, depth - k));
      VecF block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        block[lane] = lane >= count     ? VecF::zero()
                      : width == kLanes ? load(from[lane] + k)
                                        : load(from[lane] + k, width);
      }
      transpose(block);
      for (int i = 0; i < width; ++i) block[i].store(to + (k + i) * stride);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[k * stride + lane] = lane < count ? convert<float>(*x.at(first + lane, begin + k)) : 0.0f;
    }
  }
}

// to[k][row] = x(first + row, k), `rows` numbers at each k; rows from `count` on are 0.
template <int kRows, class T>
void pack_rows(const Operand<T>& x, int64_t first, int count, int64_t begin, int64_t depth,
               float* to) {
  if (x.index.dense() && count == kRows) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = x.at(first, begin + k);
      FUSED_ATTN_UNROLL
      for (int row = 0; row < kRows; ++row) to[k * kRows + row] = convert<float>(from[row]);
    }
    return;
  }
  if (x.depth.dense() && count == kRows) {
    const T* from[kRows];
    for (int row = 0; row < kRows; ++row) from[row] = x.at(first + row, begin);
    for (int64_t k = 0; k < depth; ++k) {
      FUSED_ATTN_UNROLL
      for (int row = 0; row < kRows; ++row) to[k * kRows + row] = convert<float>(from[row][k]);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int row = 0; row < kRows; ++row) {
      to[k * kRows + row] = row < count ? convert<float>(*x.at(first + row, begin + k)) : 0.0f;
    }
  }
}

}  // namespace fused_attn::linear::FUSED_ATTN_LEVEL
