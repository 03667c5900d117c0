// Gradients of the norms for NVIDIA GPUs from sm_80 on (Ba et al., "Layer normalization", 2016):
//
//   n = (h - mean) * rstd, g = dy * weight
//   dsum = rstd * (g - average(g) - n * average(g * n)) + dh        average(g) is 0 for RMSNorm
//   dresidual = dsum, dx = dropout(dsum), dweight = sum over rows of dy * n, dbias = of dy
//
// A block walks over many rows and adds up dweight and dbias of them; a second kernel adds up those
// of the blocks. No atomics: the result does not depend on who comes first.
//
// Barriers: the block's, which all of its threads arrive at and wait for: twice in each over_row()
// of a row that more than a warp holds, and between the turns of finish().
#pragma once

#include "layer_norm/cuda/rows.h"

namespace fused_attn::layer_norm {

struct DeviceNormBackward : DeviceNorm {
  const void* h_in;  // the sum that the forward kept; null: made again from x and residual
  const void *dy, *dh;
  void *dx, *dresidual;
  float *dweight_parts, *dbias_parts;  // (blocks, width); null = not wanted
};

template <class Shape>
class BackwardRows {
 public:
  using T = typename Shape::T;
  static constexpr int kWidth = Shape::kWidth;

  FUSED_ATTN_DEVICE BackwardRows(const DeviceNormBackward& p, SharedAddress scratch)
      : p_(p), scratch_(scratch) {
    each_chunk<Shape>(p.width, [&](int chunk, int column) {
      clear(dweight_[chunk]);
      clear(dbias_[chunk]);
      if constexpr (!Shape::kHeld) {
        if (p.dweight_parts != nullptr) store<Float32>(part(p.dweight_parts), column, dweight_[0]);
        if (p.dbias_parts != nullptr) store<Float32>(part(p.dbias_parts), column, dbias_[0]);
      }
    });
  }

  FUSED_ATTN_DEVICE void add(int64_t row) {
    float sum_g = 0.0f, sum_gn = 0.0f;
    each_chunk<Shape>(p_.width, [&](int chunk, int column) {
      read(row, chunk, column);
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < kWidth; ++i) {
        sum_g += g_[chunk][i];
        sum_gn += g_[chunk][i] * normal_[chunk][i];
      }
      add_parameters(chunk, column);
    });
    const float count = static_cast<float>(p_.width);
    const float average_g = p_.rms ? 0.0f : sum_over_row<Shape::kThreads>(sum_g, scratch_) / count;
    const float average_gn = sum_over_row<Shape::kThreads>(sum_gn, scratch_) / count;
    each_chunk<Shape>(p_.width, [&](int chunk, int column) {
      if constexpr (!Shape::kHeld) read(row, chunk, column);
      write(row, chunk, column, average_g, average_gn, p_.rstd[row]);
    });
  }

  // The sums of all rows that this block has seen, to global memory.
  FUSED_ATTN_DEVICE void finish(SharedAddress sums) {
    if constexpr (Shape::kHeld) {
      if (p_.dweight_parts != nullptr) finish(dweight_, p_.dweight_parts, sums);
      if (p_.dbias_parts != nullptr) finish(dbias_, p_.dbias_parts, sums);
    }
  }

 private:
  static constexpr int kHeldChunks = Shape::kHeld ? Shape::kChunks : 1;

  static FUSED_ATTN_DEVICE void clear(float (&x)[kWidth]) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) x[i] = 0.0f;
  }
  FUSED_ATTN_DEVICE float* part(float* parts) const {
    return parts + int64_t{device::block_index()} * p_.width;
  }

  // normal = (h * factor - mean) * rstd. The factor is 1, or a power of two for rows near the end
  // of the range of numbers, whose differences would overflow. Looked up whenever it is asked for:
  // the longest rows have no registers for it.
  struct Statistics {
    float factor, mean, rstd;
  };
  FUSED_ATTN_DEVICE Statistics statistics(int64_t row) const {
    Statistics s{1.0f, p_.mean == nullptr ? 0.0f : p_.mean[row], p_.rstd[row]};
    if (s.rstd < 0x1p-100f) {
      s.factor = 0x1p-96f;
      s.mean *= s.factor;
      s.rstd = times_2_to_96(s.rstd);
    }
    return s;
  }

  FUSED_ATTN_DEVICE void read(int64_t row, int chunk, int column) {
    float (&normal)[kWidth] = normal_[chunk];
    load_sum(row, column, normal);
    const Statistics s = statistics(row);
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) {
      normal[i] = device::multiply_add(normal[i], s.factor, -s.mean) * s.rstd;
    }
    load<T>(row_of<T>(p_.dy, row, p_.width), column, dy_);
    float weight[kWidth];
    if (p_.weight != nullptr) load_parameter<T>(p_, p_.weight, column, weight);
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) {
      g_[chunk][i] = p_.weight == nullptr ? dy_[i] : dy_[i] * weight[i];
    }
  }
  FUSED_ATTN_DEVICE void load_sum(int64_t row, int column, float (&h)[kWidth]) const {
    if (p_.h_in != nullptr) {
      load<T>(row_of<T>(p_.h_in, row, p_.width), column, h);
      return;
    }
    load<T>(row_of<T>(p_.x, row, p_.width), column, h);
    if (p_.residual == nullptr) return;
    if (p_.rng != nullptr) drop(p_, row, column, h);
    float residual[kWidth];
    load<T>(row_of<T>(p_.residual, row, p_.width), column, residual);
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) h[i] = T::widen(T::narrow(h[i] + residual[i]));
  }

  FUSED_ATTN_DEVICE void add_parameters(int chunk, int column) {
    if constexpr (!Shape::kHeld) {
      if (p_.dweight_parts != nullptr) load<Float32>(part(p_.dweight_parts), column, dweight_[0]);
      if (p_.dbias_parts != nullptr) load<Float32>(part(p_.dbias_parts), column, dbias_[0]);
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) {
      dweight_[chunk][i] += dy_[i] * normal_[chunk][i];
      dbias_[chunk][i] += dy_[i];
    }
    if constexpr (!Shape::kHeld) {
      if (p_.dweight_parts != nullptr) store<Float32>(part(p_.dweight_parts), column, dweight_[0]);
      if (p_.dbias_parts != nullptr) store<Float32>(part(p_.dbias_parts), column, dbias_[0]);
    }
  }

  FUSED_ATTN_DEVICE void write(int64_t row, int chunk, int column, float average_g,
                               float average_gn, float rstd) {
    float dsum[kWidth], dh[kWidth];
    if (p_.dh != nullptr) load<T>(row_of<T>(p_.dh, row, p_.width), column, dh);
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kWidth; ++i) {
      dsum[i] = (g_[chunk][i] - average_g - normal_[chunk][i] * average_gn) * rstd;
      if (p_.dh != nullptr) dsum[i] += dh[i];
    }
    if (p_.dresidual != nullptr) store<T>(row_of<T>(p_.dresidual, row, p_.width), column, dsum);
    if (p_.dx == nullptr) return;
    if (p_.rng != nullptr) drop(p_, row, column, dsum);
    store<T>(row_of<T>(p_.dx, row, p_.width), column, dsum);
  }

  // Rows held by warps: their sums are added in shared memory, one warp after the other.
  FUSED_ATTN_DEVICE void finish(float (&sums)[kHeldChunks][kWidth], float* parts,
                                SharedAddress shared) {
    constexpr int kRows = kRowsPerBlock<Shape::kThreads>;
    const int mine = device::thread_index() / Shape::kThreads;
    for (int turn = 0; turn + 1 < kRows; ++turn) {
      if (mine == turn) {
        each_chunk<Shape>(p_.width, [&](int chunk, int column) {
          FUSED_ATTN_UNROLL_LOOP
          for (int i = 0; i < kWidth; ++i) {
            const SharedAddress at = shared + 4 * (column + i);
            if (turn > 0) sums[chunk][i] += device::shared_load_float(at);
            device::shared_store(at, sums[chunk][i]);
          }
        });
      }
      device::sync_block();
    }
    if (mine == kRows - 1) {
      each_chunk<Shape>(p_.width, [&](int chunk, int column) {
        FUSED_ATTN_UNROLL_LOOP
        for (int i = 0; i < kWidth && kRows > 1; ++i) {
          sums[chunk][i] += device::shared_load_float(shared + 4 * (column + i));
        }
        store<Float32>(part(parts), column, sums[chunk]);
      });
    }
    device::sync_block();
  }

  const DeviceNormBackward& p_;
  SharedAddress scratch_;
  float dy_[kWidth];
  float normal_[kHeldChunks][kWidth], g_[kHeldChunks][kWidth];
  float dweight_[kHeldChunks][kWidth], dbias_[kHeldChunks][kWidth];
};

constexpr int kScratchBytes = 128;

template <class Shape>
FUSED_ATTN_KERNEL(kBlockThreads<Shape::kThreads>)
norm_backward_kernel(FUSED_ATTN_GRID_CONSTANT DeviceNormBackward p) {
  constexpr int kRows = kRowsPerBlock<Shape::kThreads>;
  BackwardRows<Shape> rows(p, device::shared_base());
  const int64_t step = int64_t{device::block_count()} * kRows;
  FUSED_ATTN_KEEP_LOOP
  for (int64_t row =
           int64_t{device::block_index()} * kRows + device::thread_index() / Shape::kThreads;
       row < p.rows; row += step) {
    rows.add(row);
  }
  if (kRows > 1) device::sync_block();
  rows.finish(device::shared_base() + kScratchBytes);
}

// Columns of (parts, width) added up in a fixed order: 8 threads a column, then one of them.
constexpr int kSumThreads = 256;
constexpr int kSumColumns = 32;

template <class T>
FUSED_ATTN_KERNEL(kSumThreads)
norm_column_sum_kernel(const float* const parts, const int count, const int width, void* const to) {
  constexpr int kShare = kSumThreads / kSumColumns;
  const int share = device::thread_index() / kSumColumns;
  const int column = device::block_index() * kSumColumns + device::thread_index() % kSumColumns;
  float sum = 0.0f;
  if (column < width) {
    for (int i = share; i < count; i += kShare) sum += parts[int64_t{i} * width + column];
  }
  const SharedAddress shared = device::shared_base();
  device::shared_store(shared + 4 * device::thread_index(), sum);
  device::sync_block();
  if (share != 0 || column >= width) return;
  for (int s = 1; s < kShare; ++s) {
    sum += device::shared_load_float(shared + 4 * (device::thread_index() + s * kSumColumns));
  }
  device::global_store(static_cast<typename T::Bits*>(to) + column, T::narrow(sum));
}

}  // namespace fused_attn::layer_norm
