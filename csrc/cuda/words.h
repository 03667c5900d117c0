// Types and macros of the vocabulary (device.h) that both of its implementations use.
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"

#if defined(FUSED_ATTN_EMULATED)
#include <algorithm>
#include <cmath>

#define FUSED_ATTN_DEVICE inline
#define FUSED_ATTN_KERNEL(threads) inline void
#define FUSED_ATTN_GRID_CONSTANT const
#define FUSED_ATTN_UNROLL_LOOP
#define FUSED_ATTN_KEEP_LOOP
#else
#define FUSED_ATTN_DEVICE __device__ __forceinline__
#define FUSED_ATTN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSED_ATTN_GRID_CONSTANT const __grid_constant__
#define FUSED_ATTN_UNROLL_LOOP _Pragma("unroll")
#define FUSED_ATTN_KEEP_LOOP _Pragma("unroll 1")
#endif

namespace fused_attn::device {

using SharedAddress = uint32_t;

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;

// Coordinates of a tile in a tensor map (tensor_map.h).
struct TileAt {
  int column, row, third, fourth, fifth;
};

// How long the second-level cache should keep what a copy reads.
enum class Keep { kBriefly, kLong };

}  // namespace fused_attn::device
