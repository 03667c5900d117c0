// What a block of queries works on, of the forward and of dq, and where its pieces are in shared
// memory.
#pragma once

#include "attention/sm90/padding.h"
#include "attention/sm90/tile.h"

namespace fused_attn::attention {

using device::Keep;
using device::TileAt;

// The rows of a sequence in a tensor map: `length` of them from row `start` on.
struct SequenceRows {
  bool packed;
  int start, length, head, batch;

  FUSED_ATTN_DEVICE TileAt at(int column, int row) const {
    if (!packed) return {column, row, 0, head, batch};
    return {column, kRaggedRows - length + row, start + length, kRaggedRows, head};
  }
};

FUSED_ATTN_DEVICE SequenceRows query_rows(const DeviceProblem& p, const Sequence& s, int head) {
  return {p.cu_seqlens_q != nullptr, s.start_q, s.seqlen_q, head, s.tensor_batch};
}
// Packed, the copy engine reads zeros past the last key that somebody may see; dense, only past the
// end of the tensor.
FUSED_ATTN_DEVICE SequenceRows key_rows(const DeviceProblem& p, const Sequence& s, const Band& band,
                                        int head_kv) {
  return {p.cu_seqlens_k != nullptr, s.start_k, band.key_end(), head_kv, s.tensor_batch};
}
// May the keys [.., end) have one, as they are copied, that lies past all that somebody may see,
// and is no zero?
FUSED_ATTN_DEVICE bool reads_past_keys(const DeviceProblem& p, const Band& band, int end) {
  return p.cu_seqlens_k == nullptr && end > band.key_end() && band.key_end() < p.seqlen_k;
}

// All panels of a tile, by one thread; `barrier` must expect its bytes.
template <class Tile, Keep kKeep>
FUSED_ATTN_DEVICE void load_panels(SharedAddress to, const TensorMap& map, SharedAddress barrier,
                                   const SequenceRows& rows, int row) {
  FUSED_ATTN_UNROLL_LOOP
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    device::load_tile<kKeep>(to + panel * Tile::kPanelBytes, map, barrier,
                             rows.at(panel * kTileColumns, row));
  }
}

// 64 rows of a tile from `row` on to global memory, by one thread.
template <class Tile>
FUSED_ATTN_DEVICE void store_panels(const TensorMap& map, SharedAddress tile, int row,
                                    const SequenceRows& rows, int to_row) {
  FUSED_ATTN_UNROLL_LOOP
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    device::store_tile(map, tile + panel * Tile::kPanelBytes + row * kTileRowBytes,
                       rows.at(panel * kTileColumns, to_row));
  }
  device::commit_stores();
  device::wait_stores();
}

// A warpgroup's fragment of 64 rows, packed in pairs, into a tile.
template <class Tile, int kCount>
FUSED_ATTN_DEVICE void packed_to_tile(const uint32_t (&x)[kCount], SharedAddress tile, int row) {
  const int thread = device::opaque(device::thread_index()) % device::kWarpgroupThreads;
  const int lane = thread % device::kWarpThreads, warp = thread / device::kWarpThreads;
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; i += 4) {
    device::store_matrices(Tile::chunk(tile, row + warp * 16 + lane % 16, 4 * i + lane / 16 * 8),
                           x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

// The same from an accumulator, rounded to 16 bits.
template <class Element, class Tile, int kCount>
FUSED_ATTN_DEVICE void fragment_to_tile(const float (&x)[kCount], SharedAddress tile, int row) {
  uint32_t packed[kCount / 2];
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount / 2; ++i) packed[i] = Element::pack(x[2 * i], x[2 * i + 1]);
  packed_to_tile<Tile>(packed, tile, row);
}

// The same element by element, for tensors that no tensor map describes. `row` is that of the
// warpgroup's first, `rows_there` those of the tensor.
template <class Element, int kCount>
FUSED_ATTN_DEVICE void store_elements(const float (&x)[kCount], const DeviceView& view,
                                      const SequenceRows& rows, int rows_there, int columns,
                                      int row) {
  const Fragment fragment(device::thread_index() % device::kWarpgroupThreads);
  FUSED_ATTN_UNROLL_LOOP
  for (int i = 0; i < kCount; i += 2) {
    const int r = row + fragment.row + (i & 2) * 4, column = fragment.column + i / 4 * 8;
    if (r >= rows.length || rows.start + r >= rows_there) continue;
    uint16_t* to = const_cast<uint16_t*>(view.at<uint16_t>(rows.batch, rows.head, rows.start + r));
    const uint32_t pair = Element::pack(x[i], x[i + 1]);
    const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
    if (column < columns) device::global_store(to + column * view.stride[3], low);
    if (column + 1 < columns) device::global_store(to + (column + 1) * view.stride[3], high);
  }
}

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

// Where a kernel's shared memory begins, aligned for swizzled tiles, and its barriers: one alone,
// then kinds of one per stage.
template <class Config>
struct SharedBase {
  SharedAddress base;

  FUSED_ATTN_DEVICE SharedBase() : base((device::shared_base() + 1023u) & ~1023u) {}

 protected:
  FUSED_ATTN_DEVICE SharedAddress first_barrier() const { return base + Config::kBarriers; }
  FUSED_ATTN_DEVICE SharedAddress barrier(int kind, int stage) const {
    return base + Config::kBarriers + 8 * (1 + kind * Config::kStages + stage);
  }
};

// Addresses of tiles and barriers. Every stage of K and V has a barrier for "full" and one for
// "empty"; a third, "raw", is for tiles that have to be cleaned before use: V's in the forward, K's
// for dq.
template <class Config>
struct SharedMap : SharedBase<Config> {
  using SharedBase<Config>::base;

  FUSED_ATTN_DEVICE SharedAddress q() const { return base + Config::kQ; }
  FUSED_ATTN_DEVICE SharedAddress k(int stage) const {
    return base + Config::kK + stage * Config::KvTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress v(int stage) const {
    return base + Config::kV + stage * Config::KvTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress padding() const { return base + Config::kPadding; }
  FUSED_ATTN_DEVICE SharedAddress q_full() const { return this->first_barrier(); }
  FUSED_ATTN_DEVICE SharedAddress k_full(int stage) const { return this->barrier(0, stage); }
  FUSED_ATTN_DEVICE SharedAddress k_empty(int stage) const { return this->barrier(1, stage); }
  FUSED_ATTN_DEVICE SharedAddress v_full(int stage) const { return this->barrier(2, stage); }
  FUSED_ATTN_DEVICE SharedAddress v_empty(int stage) const { return this->barrier(3, stage); }
  FUSED_ATTN_DEVICE SharedAddress raw(int stage) const { return this->barrier(4, stage); }

  // By one thread; a barrier of the block must follow.
  FUSED_ATTN_DEVICE void init_barriers() const {
    device::barrier_init(q_full(), 1, "q_full");
    for (int stage = 0; stage < Config::kStages; ++stage) {
      device::barrier_init(k_full(stage), 1, "k_full");
      device::barrier_init(k_empty(stage), Config::kGroups, "k_empty");
      device::barrier_init(v_full(stage), 1, "v_full");
      device::barrier_init(v_empty(stage), Config::kGroups, "v_empty");
      device::barrier_init(raw(stage), 1, "raw");
    }
    device::fence_barrier_init();
  }
};

// Bool masks, and biases of -inf, hide keys element by element.
FUSED_ATTN_DEVICE bool masks_elements(const DeviceProblem& p) {
  return p.mask.data != nullptr || p.bias.data != nullptr;
}

// The queries [query_begin, query_begin + kBlockM) of one head.
template <class Config>
struct Block {
  using Padding = PaddingBits<Config>;

  int head, query_begin;
  Sequence sequence;
  Band band;
  KeyTiles<Config::kBlockN> tiles;
  Padding padding;

  // Later queries first: under a causal mask they have the most to do.
  FUSED_ATTN_DEVICE Block(const DeviceProblem& p, int index, SharedAddress padding_bits)
      : Block(p, BlockPlace(index, row_blocks(p), p.head_count, p.heads_together), padding_bits) {}

  FUSED_ATTN_DEVICE bool empty() const { return query_begin >= sequence.seqlen_q; }

  // A tile of K or V, by one thread.
  FUSED_ATTN_DEVICE void load(const DeviceProblem& p, const TensorMap& map, SharedAddress to,
                              SharedAddress barrier, int tile) const {
    device::barrier_expect(barrier, Config::KvTile::kBytes);
    load_panels<typename Config::KvTile, Keep::kLong>(
        to, map, barrier, key_rows(p, sequence, band, head / p.group), tile * Config::kBlockN);
  }

  // All warps together, before next() and kind(); a barrier must follow.
  FUSED_ATTN_DEVICE void fill_padding(const DeviceProblem& p) const {
    padding.fill(sequence.batch, tiles.begin, tiles.end, band.key_end(), [&](int tile) {
      return Config::kGeneral && p.mask.data != nullptr &&
             !MaskTile<Config>(p, sequence, band, head, query_begin, tile * Config::kBlockN)
                  .any_visible();
    });
  }

  FUSED_ATTN_DEVICE TileKind kind(int tile) const { return padding.kind(tile, tiles.plain(tile)); }

  // From right to left: the next tile to visit after `tile`; tiles.begin - 1 after the last.
  FUSED_ATTN_DEVICE int next(int tile) const {
    do --tile;
    while (tile >= tiles.begin && kind(tile) == TileKind::kSkip);
    return tile;
  }

  // May the tile hold a key that no query of the sequence sees?
  FUSED_ATTN_DEVICE bool hides_keys(const DeviceProblem& p, int tile) const {
    return (padding.present() && kind(tile) == TileKind::kMasked) ||
           tile * Config::kBlockN < band.key_begin() ||
           reads_past_keys(p, band, (tile + 1) * Config::kBlockN) ||
           (Config::kGeneral && masks_elements(p));
  }
  // By band or padding.
  FUSED_ATTN_DEVICE bool hides_key(const DeviceProblem& /*p*/, int key) const {
    if (key < band.key_begin() || key >= band.key_end()) return true;
    if (!padding.present()) return false;
    const uint32_t bits = padding.word(key / Config::kBlockN, key % Config::kBlockN / 32);
    return (bits >> key % 32 & 1) == 0;
  }

 private:
  static FUSED_ATTN_DEVICE int row_blocks(const DeviceProblem& p) {
    return (p.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  }
  FUSED_ATTN_DEVICE Block(const DeviceProblem& p, const BlockPlace& place,
                          SharedAddress padding_bits)
      : head((p.first_head + place.head) % p.num_heads),
        query_begin((row_blocks(p) - 1 - place.piece) * Config::kBlockM),
        sequence(p, (p.first_head + place.head) / p.num_heads),
        band(p, sequence),
        tiles(band, query_begin, smaller(query_begin + Config::kBlockM, sequence.seqlen_q)),
        padding(p, padding_bits) {}
};

// Zeroes the rows of keys that no query of the sequence sees. A product with 0 is not enough, for
// 0 * NaN is NaN. For one warp. `Block` says what band and padding hide.
template <class Config, class Block>
class TileCleaner {
 public:
  using KvTile = typename Config::KvTile;
  static constexpr uint32_t kExponent = Config::Element::kExponent * 0x10001u;

  FUSED_ATTN_DEVICE TileCleaner(const DeviceProblem& p, const Block& block)
      : p_(p), block_(block), lane_(device::thread_index() % device::kWarpThreads) {}

  // Tiles that came in raw are cleaned and passed on. `tile_at`, `raw`, `full`: address and
  // barriers by stage.
  template <class TileAtStage, class Raw, class Full>
  FUSED_ATTN_DEVICE void run(const TileAtStage& tile_at, const Raw& raw, const Full& full) const {
    static_assert(Config::kStages <= 32, "a bit per stage");
    Ring<Config::kStages> ring;
    uint32_t phases = 0;  // of the raw barriers: not every tile comes in raw
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      const int stage = ring.stage;
      ring.advance();
      if (!block_.hides_keys(p_, tile)) continue;
      device::barrier_wait(raw(stage), phases >> stage & 1);
      phases ^= 1u << stage;
      clean(tile_at(stage), tile * Config::kBlockN, 0, Config::kBlockN);
      device::fence_async();
      device::sync_warp();
      if (lane_ == 0) device::barrier_arrive(full(stage));
    }
  }

  // Rows [begin, end) of the tile whose row 0 is key `first_key`.
  FUSED_ATTN_DEVICE void clean(SharedAddress tile, int first_key, int begin, int end) const {
    // Only numbers that are none can be hidden by elements and hurt: there are hardly ever any.
    const bool suspect = Config::kGeneral && masks_elements(p_) && any_not_finite(tile, begin, end);
    FUSED_ATTN_KEEP_LOOP
    for (int row = begin; row < end; ++row) {
      const bool hidden =
          block_.hides_key(p_, first_key + row) ||
          (suspect && any_not_finite(tile, row, row + 1) && nobody_sees(first_key + row));
      if (!hidden) continue;
      FUSED_ATTN_UNROLL_LOOP
      for (int panel = 0; panel < KvTile::kPanels; ++panel) {
        device::shared_store(word(tile, row, panel), 0u);
      }
    }
  }

 private:
  FUSED_ATTN_DEVICE SharedAddress word(SharedAddress tile, int row, int panel) const {
    return tile + panel * KvTile::kPanelBytes + row * kTileRowBytes + 4 * lane_;
  }

  FUSED_ATTN_DEVICE bool any_not_finite(SharedAddress tile, int begin, int end) const {
    bool found = false;
    FUSED_ATTN_KEEP_LOOP
    for (int row = begin; row < end; ++row) {
      FUSED_ATTN_UNROLL_LOOP
      for (int panel = 0; panel < KvTile::kPanels; ++panel) {
        const uint32_t exponents = device::shared_load_word(word(tile, row, panel)) & kExponent;
        found = found || (exponents & 0xffff) == (kExponent & 0xffff) ||
                (exponents >> 16) == (kExponent >> 16);
      }
    }
    return device::ballot(found) != 0;
  }

  // Do masks and bias hide this key from all queries of all heads?
  FUSED_ATTN_DEVICE bool nobody_sees(int key) const {
    const Sequence& s = block_.sequence;
    bool seen = false;
    FUSED_ATTN_KEEP_LOOP
    for (int head = 0; head < p_.num_heads; ++head) {
      FUSED_ATTN_KEEP_LOOP
      for (int query = block_.band.first_query(key) + lane_; query < block_.band.end_query(key);
           query += device::kWarpThreads) {
        seen = seen || !(by_mask(s.batch, head, query, key) || by_bias(s.batch, head, query, key));
      }
    }
    return device::ballot(seen) == 0;
  }
  FUSED_ATTN_DEVICE bool by_mask(int batch, int head, int query, int key) const {
    if (p_.mask.data == nullptr) return false;
    return p_.mask.at<uint8_t>(batch, head, query)[key * p_.mask.stride[3]] == 0;
  }
  FUSED_ATTN_DEVICE bool by_bias(int batch, int head, int query, int key) const {
    if (p_.bias.data == nullptr) return false;
    return read_bias<typename Config::Element>(p_, batch, head, query, key) == -device::infinity();
  }

  const DeviceProblem& p_;
  const Block& block_;
  int lane_;
};

}  // namespace fused_attn::attention
