// Tensor maps: how the copy engine sees a tensor of 16-bit elements in global memory.
//
// Dimension 0 is a row, contiguous, read 64 elements (128 bytes) at a time and laid out in shared
// memory with the 128-byte swizzle. Dimensions 1 and 2 have the same stride. That makes a map
// "ragged": rows of a sequence of length n that starts at row s are addressed as
// (window - n + row, s + n), so that the bound of dimension 1, `window`, ends every sequence where
// it ends, and the engine itself fills the rest with zeros when it reads and drops it when it
// writes. `base` is shifted back by `window` rows to make up for it.
#pragma once

#include <cuda.h>

namespace fused_attn {

constexpr int kTensorMapRank = 5;
constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128;

using TensorMap = CUtensorMap;

}  // namespace fused_attn
