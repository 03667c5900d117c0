// Attention forward for sm_90: one block computes kBlockM rows of one head.
//
// A producer warpgroup copies tiles of K and V into a ring of stages; each of the consumer
// warpgroups holds 64 queries, and their running softmax and output in registers (Shah et al.,
// "FlashAttention-3", 2024, whose structure this is).
#pragma once

#include "attention/sm90/block.h"
#include "attention/sm90/score.h"
#include "attention/sm90/softmax.h"

namespace fused_attn::attention {

struct ForwardMaps {
  TensorMap q, k, v, out;
};

template <class Tile>
class ForwardProducer {
 public:
  FUSED_ATTN_DEVICE ForwardProducer(const ForwardMaps& maps, const DeviceProblem& p,
                                    const Block<Tile>& block, const SharedMap<Tile>& shared)
      : maps_(maps), p_(p), block_(block), shared_(shared) {}

  // One thread: loads everything that the consumers will ask for, in their order.
  FUSED_ATTN_DEVICE void load() const {
    load_q();
    Ring<Tile::kStages> ring;
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      const int stage = ring.stage;
      device::barrier_wait(shared_.k_empty(stage), ring.phase ^ 1);
      block_.load(p_, maps_.k, shared_.k(stage), shared_.k_full(stage), tile);
      device::barrier_wait(shared_.v_empty(stage), ring.phase ^ 1);
      block_.load(p_, maps_.v, shared_.v(stage),
                  block_.hides_keys(p_, tile) ? shared_.raw(stage) : shared_.v_full(stage), tile);
      ring.advance();
    }
  }

  // One warp: what is stored where nobody looks must not matter.
  FUSED_ATTN_DEVICE void clean() const {
    const auto v = [&](int stage) { return shared_.v(stage); };
    const auto raw = [&](int stage) { return shared_.raw(stage); };
    const auto full = [&](int stage) { return shared_.v_full(stage); };
    TileCleaner<Tile, Block<Tile>>(p_, block_).run(v, raw, full);
  }

 private:
  FUSED_ATTN_DEVICE void load_q() const {
    device::barrier_expect(shared_.q_full(), Tile::QTile::kBytes);
    load_panels<typename Tile::QTile, Keep::kBriefly>(shared_.q(), maps_.q, shared_.q_full(),
                                                      query_rows(p_, block_.sequence, block_.head),
                                                      block_.query_begin);
  }

  const ForwardMaps& maps_;
  const DeviceProblem& p_;
  const Block<Tile>& block_;
  const SharedMap<Tile>& shared_;
};

// 64 queries. General kernels keep one product in flight at a time, which leaves registers for what
// else they do.
template <class Tile>
class ForwardConsumer {
 public:
  FUSED_ATTN_DEVICE ForwardConsumer(const ForwardMaps& maps, const DeviceProblem& p,
                                    const Block<Tile>& block, const SharedMap<Tile>& shared,
                                    int group)
      : maps_(maps),
        p_(p),
        block_(block),
        shared_(shared),
        group_(group),
        thread_(device::thread_index() % device::kWarpgroupThreads),
        fragment_(thread_) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) out_[i] = 0.0f;
  }

  FUSED_ATTN_DEVICE void run() {
    device::barrier_wait(shared_.q_full(), 0);
    if constexpr (kGeneral) {
      run_in_turn();
    } else {
      run_overlapped();
    }
    finish();
  }

 private:
  static constexpr bool kGeneral = Tile::kGeneral;
  static constexpr int kBlockN = Tile::kBlockN;
  using QTile = typename Tile::QTile;
  using KvTile = typename Tile::KvTile;
  using ScoreProduct = device::Mma<typename Tile::Element, kBlockN, false, false>;
  using OutProduct = device::Mma<typename Tile::Element, Tile::kHeadDim, false, true>;

  // One product after the other.
  FUSED_ATTN_DEVICE void run_in_turn() {
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      device::barrier_wait(shared_.k_full(ring_.stage), ring_.phase);
      issue_scores(ring_.stage);
      device::mma_wait<0>();
      device::pin(scores_);
      release(shared_.k_empty(ring_.stage));
      float shrink[2];
      soften<true>(tile, shrink);
      pack();
      rescale(shrink);
      device::barrier_wait(shared_.v_full(ring_.stage), ring_.phase);
      issue_out(ring_.stage);
      device::mma_wait<0>();
      device::pin(out_);
      device::pin(packed_);
      release(shared_.v_empty(ring_.stage));
      ring_.advance();
    }
  }

  // The softmax of one tile runs while the output product of the tile before it does, and, with
  // ping-pong, while the other warpgroup has the matrix unit.
  FUSED_ATTN_DEVICE void run_overlapped() {
    int tile = block_.next(block_.tiles.end);
    if (tile < block_.tiles.begin) return;
    if (Tile::kPingPong && group_ == 0) device::named_arrive(turn(0), kTurnThreads);
    float shrink[2];
    device::barrier_wait(shared_.k_full(0), 0);
    issue_scores(0);
    device::mma_wait<0>();
    device::pin(scores_);
    release(shared_.k_empty(0));
    soften<true>(tile, shrink);
    pack();
    FUSED_ATTN_KEEP_LOOP
    for (tile = block_.next(tile); tile >= block_.tiles.begin; tile = block_.next(tile)) {
      if (block_.kind(tile) == TileKind::kPlain) {
        overlapped_step<false>(tile);
      } else {
        overlapped_step<true>(tile);
      }
    }
    device::barrier_wait(shared_.v_full(ring_.stage), ring_.phase);
    issue_out(ring_.stage);
    device::mma_wait<0>();
    device::pin(out_);
    device::pin(packed_);
  }

  template <bool kMasked>
  FUSED_ATTN_DEVICE void overlapped_step(int tile) {
    const Ring<Tile::kStages> before = ring_;
    ring_.advance();
    device::barrier_wait(shared_.k_full(ring_.stage), ring_.phase);
    if (Tile::kPingPong) device::named_sync(turn(group_), kTurnThreads);
    issue_scores(ring_.stage);
    device::barrier_wait(shared_.v_full(before.stage), before.phase);
    issue_out(before.stage);
    if (Tile::kPingPong) device::named_arrive(turn((group_ + 1) % Tile::kGroups), kTurnThreads);
    device::mma_wait<1>();
    device::pin(scores_);
    release(shared_.k_empty(ring_.stage));
    float shrink[2];
    soften<kMasked>(tile, shrink);
    device::mma_wait<0>();
    device::pin(out_);
    device::pin(packed_);
    release(shared_.v_empty(before.stage));
    pack();
    rescale(shrink);
  }

  // scores = q k^T
  FUSED_ATTN_DEVICE void issue_scores(int stage) {
    const uint64_t q = QTile::by_rows(shared_.q() + group_ * 64 * kTileRowBytes);
    const uint64_t k = KvTile::by_rows(shared_.k(stage));
    device::mma_fence();
    FUSED_ATTN_UNROLL_LOOP
    for (int step = 0; step < Tile::kHeadDim / 16; ++step) {
      ScoreProduct::from_shared(scores_, q + QTile::row_step(step), k + KvTile::row_step(step),
                                step != 0);
    }
    device::mma_commit();
  }

  // out += probabilities v
  FUSED_ATTN_DEVICE void issue_out(int stage) {
    const uint64_t v = KvTile::by_columns(shared_.v(stage));
    device::pin(packed_);
    device::mma_fence();
    FUSED_ATTN_UNROLL_LOOP
    for (int step = 0; step < kBlockN / 16; ++step) {
      OutProduct::from_registers(out_, packed_[4 * step], packed_[4 * step + 1],
                                 packed_[4 * step + 2], packed_[4 * step + 3],
                                 v + KvTile::column_step(step), true);
    }
    device::mma_commit();
  }

  // scores -> probabilities that lack the division by their sum.
  template <bool kMasked>
  FUSED_ATTN_DEVICE void soften(int tile, float (&shrink)[2]) {
    const ScoreAt<false> at{block_.sequence.batch, block_.head, query(),
                            tile * kBlockN + fragment_.column};
    if constexpr (kGeneral) {
      NoSlope unwanted;
      modify_scores<typename Tile::Element>(scores_, p_, at, block_.band, block_.sequence,
                                            unwanted);
      hide_by_mask(scores_, p_, at, block_.band);
    }
    if (kMasked && !(kGeneral && block_.kind(tile) == TileKind::kPlain)) {
      hide_by_band(scores_, at, block_.band);
      hide_by_padding(scores_, block_.padding, tile, fragment_.column);
    }
    softmax_.template step<kMasked>(scores_, multiplier(), shrink);
    if constexpr (kGeneral) {
      if (p_.rng != nullptr) drop<false>(scores_, p_, at);
    }
  }

  // An accumulator fragment, in pairs of 16 bits, is an operand fragment.
  FUSED_ATTN_DEVICE void pack() {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kBlockN / 4; ++i) {
      packed_[i] = Tile::Element::pack(scores_[2 * i], scores_[2 * i + 1]);
    }
  }

  FUSED_ATTN_DEVICE void rescale(const float (&factor)[2]) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) out_[i] *= factor[i >> 1 & 1];
  }

  // Of scores, to come to base 2.
  FUSED_ATTN_DEVICE float multiplier() const { return kGeneral ? 1.0f : p_.scale_log2; }
  FUSED_ATTN_DEVICE void release(SharedAddress empty) const {
    if (thread_ == 0) device::barrier_arrive(empty);
  }

  FUSED_ATTN_DEVICE void finish() {
    softmax_.finish();
    const float keep_scale = kGeneral ? p_.keep_scale : 1.0f;
    float factor[2];
    FUSED_ATTN_UNROLL_LOOP
    for (int row = 0; row < 2; ++row) {
      factor[row] = softmax_.sum[row] == 0.0f ? 0.0f : keep_scale / softmax_.sum[row];
    }
    rescale(factor);
    if (p_.lse != nullptr && thread_ % 4 == 0) {
      store_lse(0);
      store_lse(1);
    }
    if (p_.out_by_tile) {
      store_out_tile();
    } else {
      store_elements<typename Tile::Element>(
          out_, p_.out, query_rows(p_, block_.sequence, block_.head), p_.rows_q, p_.head_dim_v,
          block_.query_begin + group_ * 64);
    }
  }

  FUSED_ATTN_DEVICE void store_lse(int row) const {
    const int i = query() + 8 * row;
    if (i >= block_.sequence.seqlen_q || block_.sequence.start_q + i >= p_.rows_q) return;
    p_.lse[block_.sequence.tensor_batch * p_.lse_stride[0] + block_.head * p_.lse_stride[1] +
           (block_.sequence.start_q + i) * p_.lse_stride[2]] = softmax_.lse(row, multiplier());
  }

  // Through the queries' own place in shared memory: this warpgroup has read them for good.
  FUSED_ATTN_DEVICE void store_out_tile() {
    fragment_to_tile<typename Tile::Element, QTile>(out_, shared_.q(), group_ * 64);
    device::fence_async();
    device::named_sync(kGroupBarrier + group_, device::kWarpgroupThreads);
    if (thread_ != 0) return;
    store_panels<QTile>(maps_.out, shared_.q(), group_ * 64,
                        query_rows(p_, block_.sequence, block_.head),
                        block_.query_begin + group_ * 64);
  }

  FUSED_ATTN_DEVICE int query() const { return block_.query_begin + group_ * 64 + fragment_.row; }

  // Named barriers: 1.. say whose turn the matrix unit is, the next ones gather a warpgroup.
  static constexpr int kTurnThreads = 2 * device::kWarpgroupThreads;
  static constexpr int kGroupBarrier = 1 + Tile::kGroups;
  static FUSED_ATTN_DEVICE int turn(int group) { return 1 + group; }

  const ForwardMaps& maps_;
  const DeviceProblem& p_;
  const Block<Tile>& block_;
  const SharedMap<Tile>& shared_;
  int group_, thread_;
  Fragment fragment_;
  Ring<Tile::kStages> ring_;
  OnlineSoftmax softmax_;
  float scores_[kBlockN / 2];
  uint32_t packed_[kBlockN / 4];
  float out_[Tile::kHeadDim / 2];
};

template <class Tile>
FUSED_ATTN_KERNEL(Tile::kThreads)
forward_kernel(FUSED_ATTN_GRID_CONSTANT ForwardMaps maps,
               FUSED_ATTN_GRID_CONSTANT DeviceProblem p) {
  const SharedMap<Tile> shared;
  const Block<Tile> block(p, device::block_index(), shared.padding());
  if (block.empty()) return;
  // The same for all threads of a warp, and known to be so: branches on it are uniform.
  const int group = device::shuffle(device::thread_index() / device::kWarpgroupThreads, 0);
  if (device::thread_index() == 0) shared.init_barriers();
  block.fill_padding(p);
  device::sync_block();
  if (group == 0) {
    device::lower_registers<Tile::kProducerRegisters>();
    const ForwardProducer<Tile> producer(maps, p, block, shared);
    const int warp = device::thread_index() / device::kWarpThreads;
    if (warp == 0 && device::thread_index() == 0) producer.load();
    if (warp == 1) producer.clean();
  } else {
    device::raise_registers<Tile::kConsumerRegisters>();
    ForwardConsumer<Tile> consumer(maps, p, block, shared, group - 1);
    consumer.run();
  }
}

}  // namespace fused_attn::attention
