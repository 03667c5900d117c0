// Attention forward for sm_90: one block computes kBlockM rows of one head.
//
// A producer warpgroup copies tiles of K and V into a ring of stages; each of the consumer
// warpgroups holds 64 queries, and their running softmax and output in registers (Shah et al.,
// "FlashAttention-3", 2024, whose structure this is).
//
// For a backward it finds the row statistics of large scores again, from the scores: blocks of no
// such row return at once.
//
// Barriers, and how often each must be arrived at:
//   q_full            1   producer, with the bytes of q            waits: consumers, once
//   k_full[stage]     1   producer, with the bytes of the tile     waits: consumers
//   k_empty[stage]    kGroups   a thread of each consumer          waits: producer
//   v_full[stage]     1   producer with the bytes, or the cleaner  waits: consumers
//   v_empty[stage]    kGroups   a thread of each consumer          waits: producer
//   raw[stage]        1   producer, with the bytes of V's tile     waits: cleaner (warp 1)
//   named 1 + group   2 warpgroups: the other one arrives          waits: whose turn it is
//   (kPingPong) named 1 + kGroups + group   1 warpgroup                        waits: all of it,
//   before a store
#pragma once

#include "attention/sm90/consumer.h"
#include "attention/sm90/softmax.h"

namespace fused_attn::attention {

struct ForwardMaps {
  TensorMap q, k, v, out;
};

template <class Config>
class ForwardProducer {
 public:
  FUSED_ATTN_DEVICE ForwardProducer(const ForwardMaps& maps, const DeviceProblem& p,
                                    const Block<Config>& block, const SharedMap<Config>& shared)
      : maps_(maps), p_(p), block_(block), shared_(shared) {}

  // One thread: loads everything that the consumers will ask for, in their order.
  FUSED_ATTN_DEVICE void load() const {
    load_q();
    Ring<Config::kStages> ring;
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
    TileCleaner<Config, Block<Config>>(p_, block_).run(v, raw, full);
  }

 private:
  FUSED_ATTN_DEVICE void load_q() const {
    device::barrier_expect(shared_.q_full(), Config::QTile::kBytes);
    load_panels<typename Config::QTile, Keep::kBriefly>(
        shared_.q(), maps_.q, shared_.q_full(), query_rows(p_, block_.sequence, block_.head),
        block_.query_begin);
  }

  const ForwardMaps& maps_;
  const DeviceProblem& p_;
  const Block<Config>& block_;
  const SharedMap<Config>& shared_;
};

// 64 queries. General kernels keep one product in flight at a time, which leaves registers for what
// else they do.
template <class Config>
class ForwardConsumer : Consumer<Config, DeviceProblem> {
  using Base = Consumer<Config, DeviceProblem>;
  using Base::fragment_, Base::group_, Base::p_, Base::ring_, Base::thread_;
  using Base::release, Base::scale, Base::scale_log2;

 public:
  FUSED_ATTN_DEVICE ForwardConsumer(const ForwardMaps& maps, const DeviceProblem& p,
                                    const Block<Config>& block, const SharedMap<Config>& shared,
                                    int group)
      : Base(p, group), maps_(maps), block_(block), shared_(shared) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Config::kHeadDim / 2; ++i) out_[i] = 0.0f;
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
  static constexpr bool kGeneral = Config::kGeneral;
  static constexpr int kBlockN = Config::kBlockN;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using ScoreProduct = device::Mma<typename Config::Element, kBlockN, false, false>;
  using OutProduct = device::Mma<typename Config::Element, Config::kHeadDim, false, true>;

  // One product after the other.
  FUSED_ATTN_DEVICE void run_in_turn() {
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      device::barrier_wait(shared_.k_full(ring_.stage), ring_.phase);
      issue_scores(ring_.stage);
      device::mma_wait<0>();
      device::keep_in_registers(scores_);
      release(shared_.k_empty(ring_.stage));
      float correction[2];
      softmax_step<true>(tile, correction);
      pack();
      rescale(correction);
      device::barrier_wait(shared_.v_full(ring_.stage), ring_.phase);
      issue_out(ring_.stage);
      device::mma_wait<0>();
      device::keep_in_registers(out_);
      device::keep_in_registers(packed_);
      release(shared_.v_empty(ring_.stage));
      ring_.advance();
    }
  }

  // The softmax of one tile runs while the output product of the tile before it does, and, with
  // ping-pong, while the other warpgroup has the matrix unit.
  FUSED_ATTN_DEVICE void run_overlapped() {
    int tile = block_.next(block_.tiles.end);
    if (tile < block_.tiles.begin) return;
    if (Config::kPingPong && group_ == 0) device::named_arrive(turn(0), kTurnThreads);
    float correction[2];
    device::barrier_wait(shared_.k_full(0), 0);
    issue_scores(0);
    device::mma_wait<0>();
    device::keep_in_registers(scores_);
    release(shared_.k_empty(0));
    softmax_step<true>(tile, correction);
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
    device::keep_in_registers(out_);
    device::keep_in_registers(packed_);
  }

  template <bool kMasked>
  FUSED_ATTN_DEVICE void overlapped_step(int tile) {
    const Ring<Config::kStages> before = ring_;
    ring_.advance();
    device::barrier_wait(shared_.k_full(ring_.stage), ring_.phase);
    if (Config::kPingPong) device::named_sync(turn(group_), kTurnThreads);
    issue_scores(ring_.stage);
    device::barrier_wait(shared_.v_full(before.stage), before.phase);
    issue_out(before.stage);
    if (Config::kPingPong) device::named_arrive(turn((group_ + 1) % Config::kGroups), kTurnThreads);
    device::mma_wait<1>();
    device::keep_in_registers(scores_);
    release(shared_.k_empty(ring_.stage));
    float correction[2];
    softmax_step<kMasked>(tile, correction);
    Base::finish_before_wait(scores_, shared_.q_full());
    device::mma_wait<0>();
    device::keep_in_registers(out_);
    device::keep_in_registers(packed_);
    release(shared_.v_empty(before.stage));
    pack();
    rescale(correction);
  }

  // scores = q k^T
  FUSED_ATTN_DEVICE void issue_scores(int stage) {
    issue_rows<ScoreProduct, QTile, KvTile, Config::kHeadDim>(
        scores_, shared_.q() + group_ * 64 * kTileRowBytes, shared_.k(stage));
  }

  // out += probabilities v
  FUSED_ATTN_DEVICE void issue_out(int stage) {
    issue_factors<OutProduct, KvTile>(out_, packed_, shared_.v(stage));
  }

  // scores -> probabilities that lack the division by their sum.
  template <bool kMasked>
  FUSED_ATTN_DEVICE void softmax_step(int tile, float (&correction)[2]) {
    const ScoreAt<false> at{block_.sequence.batch, block_.head, query(),
                            tile * kBlockN + fragment_.column};
    if constexpr (kGeneral) {
      NoSlope unwanted;
      modify_scores<typename Config::Element>(scores_, p_, at, block_.band, block_.sequence,
                                              unwanted);
      hide_by_mask(scores_, p_, at, block_.band);
    }
    if (kMasked && !(kGeneral && block_.kind(tile) == TileKind::kPlain)) {
      hide_by_band(scores_, at, block_.band);
      hide_by_padding(scores_, block_.padding, tile, fragment_.column);
    }
    softmax_.template step<kMasked>(scores_, scale_log2(), correction);
    if constexpr (kGeneral) {
      if (p_.rng != nullptr) drop<false>(scores_, p_, at);
    }
  }

  FUSED_ATTN_DEVICE void pack() { pack_pairs<typename Config::Element>(scores_, packed_); }

  FUSED_ATTN_DEVICE void rescale(const float (&factor)[2]) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Config::kHeadDim / 2; ++i) out_[i] *= factor[i >> 1 & 1];
  }

  FUSED_ATTN_DEVICE void finish() {
    softmax_.finish();
    if (p_.base != nullptr) {
      if (thread_ % 4 == 0) {
        store_statistics(0);
        store_statistics(1);
      }
      return;
    }
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
    // Through the queries' own place in shared memory.
    store_rows<typename Config::Element, QTile>(
        out_, {maps_.out, p_.out, p_.out_by_tile, p_.rows_q, p_.head_dim_v},
        query_rows(p_, block_.sequence, block_.head), block_.query_begin + group_ * 64, shared_.q(),
        group_ * 64, kGroupBarrier + group_);
  }

  FUSED_ATTN_DEVICE void store_lse(int row) const {
    const int i = query() + 8 * row;
    if (i >= block_.sequence.seqlen_q || block_.sequence.start_q + i >= p_.rows_q) return;
    float* const row_of_lse =
        p_.lse + block_.sequence.tensor_batch * p_.lse_stride[0] + block_.head * p_.lse_stride[1];
    device::global_store(row_of_lse + (block_.sequence.start_q + i) * p_.lse_stride[2],
                         softmax_.lse(row, scale()));
  }

  FUSED_ATTN_DEVICE void store_statistics(int row) const {
    const int i = query() + 8 * row;
    if (i >= block_.sequence.seqlen_q) return;
    const int64_t at = statistics_at(p_, block_.sequence, block_.head, i);
    if (p_.base[at] == 0.0f) return;
    device::global_store(p_.base + at, softmax_.max[row]);
    device::global_store(p_.lse2 + at, device::log2_fast(softmax_.sum[row]));
  }

  FUSED_ATTN_DEVICE int query() const { return block_.query_begin + group_ * 64 + fragment_.row; }

  // Named barriers: 1.. say whose turn the matrix unit is, the next ones gather a warpgroup.
  static constexpr int kTurnThreads = 2 * device::kWarpgroupThreads;
  static constexpr int kGroupBarrier = 1 + Config::kGroups;
  static FUSED_ATTN_DEVICE int turn(int group) { return 1 + group; }

  const ForwardMaps& maps_;
  const Block<Config>& block_;
  const SharedMap<Config>& shared_;
  OnlineSoftmax softmax_;
  float scores_[kBlockN / 2];
  uint32_t packed_[kBlockN / 4];
  float out_[Config::kHeadDim / 2];
};

template <class Config>
FUSED_ATTN_KERNEL(Config::kThreads)
forward_kernel(FUSED_ATTN_GRID_CONSTANT ForwardMaps maps,
               FUSED_ATTN_GRID_CONSTANT DeviceProblem p) {
  const SharedMap<Config> shared;
  const Block<Config> block(p, device::block_index(), shared.padding());
  if (block.empty()) return;
  if (p.base != nullptr &&
      !any_base<Config::kBlockM>(
          p.base + statistics_at(p, block.sequence, block.head, block.query_begin),
          block.sequence.seqlen_q - block.query_begin)) {
    return;
  }
  run_warpgroups<Config>(
      shared, [&] { block.fill_padding(p); },
      [&](int warp) {
        const ForwardProducer<Config> producer(maps, p, block, shared);
        if (warp == 0 && device::thread_index() == 0) producer.load();
        if (warp == 1) producer.clean();
      },
      [&](int group) { ForwardConsumer<Config>(maps, p, block, shared, group).run(); });
}

}  // namespace fused_attn::attention
