// What a block of the forward works on, and where its pieces are in shared memory.
#pragma once

#include "attention/cuda_padding.h"
#include "attention/cuda_tile.h"

namespace fused_attn::attention {

using device::Keep;
using device::TileAt;

// A buffer of a few stages that producer and consumers walk through in the same order. A consumer
// waits for a full stage with `phase`, the producer for an empty one with `phase ^ 1`.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  FUSED_ATTN_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Addresses of tiles and barriers. Every stage of K and V has a barrier for "full" and one for
// "empty"; V a third, "raw", for tiles that have to be cleaned before use.
template <class Tile>
struct SharedMap {
  SharedAddress base;

  FUSED_ATTN_DEVICE SharedMap() : base((device::shared_base() + 1023u) & ~1023u) {}

  FUSED_ATTN_DEVICE SharedAddress q() const { return base + Tile::kQ; }
  FUSED_ATTN_DEVICE SharedAddress k(int stage) const {
    return base + Tile::kK + stage * Tile::KvTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress v(int stage) const {
    return base + Tile::kV + stage * Tile::KvTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress padding() const { return base + Tile::kPadding; }
  FUSED_ATTN_DEVICE SharedAddress q_full() const { return base + Tile::kBarriers; }
  FUSED_ATTN_DEVICE SharedAddress k_full(int stage) const { return barrier(0, stage); }
  FUSED_ATTN_DEVICE SharedAddress k_empty(int stage) const { return barrier(1, stage); }
  FUSED_ATTN_DEVICE SharedAddress v_full(int stage) const { return barrier(2, stage); }
  FUSED_ATTN_DEVICE SharedAddress v_empty(int stage) const { return barrier(3, stage); }
  FUSED_ATTN_DEVICE SharedAddress v_raw(int stage) const { return barrier(4, stage); }

  // By one thread; a barrier of the block must follow.
  FUSED_ATTN_DEVICE void init_barriers() const {
    device::barrier_init(q_full(), 1, "q_full");
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      device::barrier_init(k_full(stage), 1, "k_full");
      device::barrier_init(k_empty(stage), Tile::kGroups, "k_empty");
      device::barrier_init(v_full(stage), 1, "v_full");
      device::barrier_init(v_empty(stage), Tile::kGroups, "v_empty");
      device::barrier_init(v_raw(stage), 1, "v_raw");
    }
    device::fence_barrier_init();
  }

 private:
  FUSED_ATTN_DEVICE SharedAddress barrier(int kind, int stage) const {
    return base + Tile::kBarriers + 8 * (1 + kind * Tile::kStages + stage);
  }
};

// The queries [query_begin, query_begin + kBlockM) of one head.
template <class Tile>
struct Block {
  using Padding = PaddingBits<Tile::kBlockN, Tile::kThreads>;

  int head, query_begin;
  Sequence sequence;
  Band band;
  KeyTiles<Tile::kBlockN> tiles;
  Padding padding;

  // Blocks of a head follow each other, so that they find its keys in the second-level cache;
  // later queries first: under a causal mask they have the most to do.
  FUSED_ATTN_DEVICE Block(const DeviceProblem& p, int index, SharedAddress padding_bits)
      : Block(p, index / row_blocks(p), row_blocks(p) - 1 - index % row_blocks(p), padding_bits) {}

  FUSED_ATTN_DEVICE bool empty() const { return query_begin >= sequence.seqlen_q; }
  FUSED_ATTN_DEVICE TileKind kind(int tile) const { return padding.kind(tile, tiles.plain(tile)); }

  // From right to left: the next tile to visit after `tile`; tiles.begin - 1 after the last.
  FUSED_ATTN_DEVICE int next(int tile) const {
    do --tile;
    while (tile >= tiles.begin && kind(tile) == TileKind::kSkip);
    return tile;
  }

  // Does the tile hold a key that no query of the sequence sees? Its value must not count even
  // multiplied by 0. (Past the end of the keys the copy engine writes zeros.)
  FUSED_ATTN_DEVICE bool hides_keys(int tile) const {
    return (padding.present() && kind(tile) == TileKind::kMasked) ||
           tile * Tile::kBlockN < band.key_begin();
  }
  FUSED_ATTN_DEVICE bool hides_key(int key) const {
    if (key < band.key_begin()) return true;
    if (!padding.present()) return false;
    const uint32_t bits = padding.word(key / Tile::kBlockN, key % Tile::kBlockN / 32);
    return (bits >> key % 32 & 1) == 0;
  }

 private:
  static FUSED_ATTN_DEVICE int row_blocks(const DeviceProblem& p) {
    return (p.seqlen_q + Tile::kBlockM - 1) / Tile::kBlockM;
  }
  FUSED_ATTN_DEVICE Block(const DeviceProblem& p, int head_index, int row_block,
                          SharedAddress padding_bits)
      : head(head_index % p.num_heads),
        query_begin(row_block * Tile::kBlockM),
        sequence(p, head_index / p.num_heads),
        band(p, sequence),
        tiles(band, query_begin, smaller(query_begin + Tile::kBlockM, sequence.seqlen_q)),
        padding(p, sequence, padding_bits) {}
};

}  // namespace fused_attn::attention
