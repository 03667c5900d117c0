// Tensor maps: how the copy engine sees a tensor of 16-bit elements in global memory.
//
// Dimension 0 is a row, contiguous, read 64 elements (128 bytes) at a time and laid out in shared
// memory with the 128-byte swizzle. What lies outside a map is zero when it is read and dropped
// when it is written. The base of a map is the tensor's own pointer: where the memory before a
// tensor is not mapped, loads through a map that begins there fail, although none of them goes
// there.
//
// Dense: {columns, rows, 1, heads, batch}. Row r is (r, 0, head, batch).
//
// Packed, "ragged": {columns, kRaggedRows, rows + 1, kRaggedRows + 1, heads}. The rows of a
// sequence of length n that starts at row s are (kRaggedRows - n + r, s + n, kRaggedRows, head), so
// that the bound of dimension 1 ends every sequence where it ends, and that of dimension 2 the
// tensor. Dimensions 1 and 2 have the stride of a row, and kRaggedRows steps of dimension 3 make up
// for what dimension 1 is too far: they come to 2^65 bytes less as many rows, and addresses have 64
// bits.
#pragma once

#include <cuda.h>

namespace fused_attn {

constexpr int kTensorMapRank = 5;
constexpr int kRaggedRows = 1 << 30;
constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;

using TensorMap = CUtensorMap;

}  // namespace fused_attn
