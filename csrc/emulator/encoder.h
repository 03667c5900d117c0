// The driver's encoder of tensor maps, with its rules, and what the emulated copy engine reads from
// a map.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fused_attn::emulator {

CUresult CUDAAPI encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                   void* address, const cuuint64_t* size, const cuuint64_t* stride,
                                   const cuuint32_t* box, const cuuint32_t* step,
                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                   CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

constexpr int kMaxMapRank = 5;

// A map's contents; strides in bytes.
struct DecodedMap {
  void* base;
  const void* tensor;  // that it is of
  uint64_t size[kMaxMapRank], stride[kMaxMapRank];
  int32_t rank, box_rows;
};
static_assert(sizeof(DecodedMap) <= sizeof(CUtensorMap), "it takes the place of the driver's");

DecodedMap decode(const CUtensorMap& map);

}  // namespace fused_attn::emulator
