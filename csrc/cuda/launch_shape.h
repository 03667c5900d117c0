// What a launch is told: of tensor maps, and of the grid.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cuda/tensor_map.h"

namespace fused_attn::device {

// A tensor of 16-bit elements (batch, head, row, column), columns contiguous, strides in elements,
// for tiles of `box_rows` rows. `packed`: sequences share the rows, and there is no batch.
struct MapRequest {
  const void* data;
  int64_t batch, heads, rows, columns;
  int64_t stride_batch, stride_head, stride_row;
  bool packed;
  int box_rows;
};

// What the copy engine asks of a tensor: 16-byte alignment of its start and of all its strides.
inline bool can_map(const void* data, int64_t stride_batch, int64_t stride_head, int64_t stride_row,
                    int64_t stride_column) {
  const auto fits = [](int64_t stride) { return stride >= 0 && stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(stride_batch) && fits(stride_head) &&
         fits(stride_row) && stride_column == 1;
}

// The map's sizes, and the strides in bytes of dimensions 1 to 4 (tensor_map.h).
struct MapGeometry {
  int64_t size[kTensorMapRank];
  int64_t stride_bytes[kTensorMapRank - 1];

  explicit MapGeometry(const MapRequest& r) {
    // The stride of a dimension of size 1 may be anything, also what the encoder does not take.
    const auto bytes = [](int64_t stride, int64_t size) { return size > 1 ? 2 * stride : 16; };
    const int64_t row = bytes(r.stride_row, r.rows), head = bytes(r.stride_head, r.heads);
    if (r.packed) {
      constexpr int64_t kWrap = int64_t{1} << 35;  // times kRaggedRows: 2^65
      set({r.columns, kRaggedRows, r.rows + 1, kRaggedRows + 1, r.heads},
          {row, row, kWrap - row, head});
    } else {
      set({r.columns, r.rows, 1, r.heads, r.batch},
          {row, 16, head, bytes(r.stride_batch, r.batch)});
    }
  }

 private:
  void set(std::array<int64_t, kTensorMapRank> sizes,
           std::array<int64_t, kTensorMapRank - 1> strides) {
    std::copy(sizes.begin(), sizes.end(), size);
    std::copy(strides.begin(), strides.end(), stride_bytes);
  }
};

TensorMap make_tensor_map(const MapRequest& request);

// Of the current device.
int multiprocessors();

// How much of the second-level cache the tensors of blocks that run at once should fill at most.
#if defined(FUSED_ATTN_EMULATED)
constexpr int64_t kCacheBytes = 32 << 10;  // the tests' tensors are small
#else
constexpr int64_t kCacheBytes = 32 << 20;  // of 50 MiB
#endif

struct LaunchShape {
  const char* kernel;  // for messages
  int64_t blocks;
  int threads;
  uint32_t shared_bytes;
  int registers;  // per thread, as compiled; 0 = whatever
};

using Stream = void*;

}  // namespace fused_attn::device
