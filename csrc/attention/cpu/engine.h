// How attention cuts its problems: blocks of queries, tiles of keys.
#pragma once

#include "attention/params.h"
#include "cpu/engine.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

using namespace fused_attn::FUSED_ATTN_LEVEL;

constexpr int kGroups = 4;                 // groups of kLanes queries in a block
constexpr int kBlockQ = kGroups * kLanes;  // queries of a block: one bit each of a uint64_t
// Numbers from a row of a tile, [key][query] or [column][query], to the next. Products of few
// registers read 16 queries of many rows after each other: an odd number of cache lines apart,
// these lie in all sets of a cache, where 64 numbers apart they would share a quarter of them.
constexpr int kStrideQ = kRegisterVectors<float> >= 32 ? kBlockQ : kBlockQ + kLanes;
constexpr int kBlockK = 128;  // keys of a tile
// Keys that share one range of visible groups: no fewer than a product is deep at once.
constexpr int kSegment = FUSED_ATTN_BF16_TILES ? 32 : 16;

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
