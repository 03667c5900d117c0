// What a block of keys works on, for dk and dv.
#pragma once

#include "attention/sm90/block.h"

namespace fused_attn::attention {

// The keys [key_begin, key_begin + kBlockN) of one key head.
template <class Config>
struct KeyBlock {
  int head_kv, key_begin;
  Sequence sequence;
  Band band;
  QueryTiles<Config::kBlockM> tiles;

  // Earlier keys first: under a causal mask more queries see them.
  FUSED_ATTN_DEVICE KeyBlock(const DeviceProblem& p, int index)
      : KeyBlock(p, BlockPlace(index, key_blocks(p), p.batch * (p.num_heads / p.group),
                               p.key_heads_together)) {}

  FUSED_ATTN_DEVICE bool empty() const { return key_begin >= sequence.seqlen_k; }
  // May the block hold a key that no query of the sequence sees?
  FUSED_ATTN_DEVICE bool hides_keys(const DeviceProblem& p) const {
    return p.key_padding != nullptr || key_begin < band.key_begin() ||
           reads_past_keys(p, band, key_begin + Config::kBlockN) ||
           (Config::kGeneral && masks_elements(p));
  }
  // Does a bool mask hide query tile `tile` of head `g` of the group as a whole? `words`: shared
  // memory, filled by find_hidden(). Of masks that have no room there nothing is skipped.
  FUSED_ATTN_DEVICE bool mask_hides(const DeviceProblem& p, SharedAddress words, int g,
                                    int tile) const {
    if (!has_words(p)) return false;
    return device::shared_load_word(words + 4 * mask_word(p, g, tile)) == 0;
  }
  // All warps together; a barrier must follow.
  FUSED_ATTN_DEVICE void find_hidden(const DeviceProblem& p, SharedAddress words) const {
    if (!has_words(p)) return;
    const int warp = device::thread_index() / device::kWarpThreads;
    const int lane = device::thread_index() % device::kWarpThreads;
    const int count = tiles.end - tiles.begin;
    FUSED_ATTN_KEEP_LOOP
    for (int i = warp; i < masks(p) * count; i += Config::kThreads / device::kWarpThreads) {
      const int g = i / count, tile = tiles.begin + i % count;
      const MaskTile<Config> mask(p, sequence, band, head_kv * p.group + g, tile * Config::kBlockM,
                                  key_begin);
      const uint32_t visible = mask.any_visible() ? 1 : 0;
      if (lane == 0) device::shared_store(words + 4 * mask_word(p, g, tile), visible);
    }
  }
  // By band or padding.
  FUSED_ATTN_DEVICE bool hides_key(const DeviceProblem& p, int key) const {
    return key < band.key_begin() || key >= band.key_end() || padded(p, key);
  }
  FUSED_ATTN_DEVICE bool padded(const DeviceProblem& p, int key) const {
    return p.key_padding != nullptr && key < band.key_end() &&
           p.key_padding[sequence.batch * p.key_padding_stride[0] +
                         key * p.key_padding_stride[1]] == 0;
  }

 private:
  static FUSED_ATTN_DEVICE int query_tiles(const DeviceProblem& p) {
    return (p.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  }
  // Of the heads of a group.
  static FUSED_ATTN_DEVICE int masks(const DeviceProblem& p) {
    return p.mask.stride[1] == 0 ? 1 : p.group;
  }
  static FUSED_ATTN_DEVICE bool has_words(const DeviceProblem& p) {
    return Config::kGeneral && p.mask.data != nullptr &&
           masks(p) * query_tiles(p) <= Config::kMaxMaskWords;
  }
  static FUSED_ATTN_DEVICE int mask_word(const DeviceProblem& p, int g, int tile) {
    return (p.mask.stride[1] == 0 ? 0 : g) * query_tiles(p) + tile;
  }
  static FUSED_ATTN_DEVICE int key_blocks(const DeviceProblem& p) {
    return (p.seqlen_k + Config::kBlockN - 1) / Config::kBlockN;
  }
  FUSED_ATTN_DEVICE KeyBlock(const DeviceProblem& p, const BlockPlace& place)
      : head_kv(place.head % (p.num_heads / p.group)),
        key_begin(place.piece * Config::kBlockN),
        sequence(p, place.head / (p.num_heads / p.group)),
        band(p, sequence),
        tiles(band, key_begin, key_begin + Config::kBlockN) {}
};

}  // namespace fused_attn::attention
