// What a launch is told: of tensor maps, and of the grid.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"

namespace fused_attn::device {

// A tensor of 16-bit elements (batch, head, row, column), columns contiguous, strides in elements,
// for tiles of `box_rows` rows; see tensor_map.h for `window`, and `rows` for all rows there are.
struct MapRequest {
  const void* data;
  int64_t batch, heads, rows, columns;
  int64_t stride_batch, stride_head, stride_row;
  int64_t window;
  int box_rows;
};

// What the copy engine asks of a tensor: 16-byte alignment of its start and of all its strides.
inline bool can_map(const void* data, int64_t stride_batch, int64_t stride_head, int64_t stride_row,
                    int64_t stride_column) {
  const auto fits = [](int64_t stride) { return stride >= 0 && stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(stride_batch) && fits(stride_head) &&
         fits(stride_row) && stride_column == 1;
}

// The map's sizes, and the strides in bytes of dimensions 1 to 4.
struct MapGeometry {
  int64_t size[kTensorMapRank];
  int64_t stride_bytes[kTensorMapRank - 1];
  void* base;

  explicit MapGeometry(const MapRequest& r) {
    // A dimension of size 1 has stride 0 here, which the encoder does not take.
    const auto bytes = [](int64_t stride) { return 2 * (stride > 0 ? stride : 8); };
    const int64_t row = bytes(r.stride_row);
    const int64_t sizes[] = {r.columns, r.window, r.rows + 1, r.heads, r.batch};
    const int64_t strides[] = {row, row, bytes(r.stride_head), bytes(r.stride_batch)};
    for (int d = 0; d < kTensorMapRank; ++d) size[d] = sizes[d];
    for (int d = 0; d < kTensorMapRank - 1; ++d) stride_bytes[d] = strides[d];
    base = static_cast<uint8_t*>(const_cast<void*>(r.data)) - r.window * row;
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
