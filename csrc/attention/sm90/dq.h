// The gradient of q (and of the bias) for sm_90: one block holds kBlockM queries of one head and
// walks over their keys, as the forward does.
//
// Barriers, and how often each must be arrived at:
//   q_full           1   producer, with the bytes of q and dout   waits: consumers, once
//   k_full[stage]    1   producer with the bytes, or the cleaner  waits: consumers
//   k_empty[stage]   kGroups   a thread of each consumer          waits: producer
//   v_full[stage]    1   producer, with the bytes of the tile     waits: consumers
//   v_empty[stage]   kGroups   a thread of each consumer          waits: producer
//   raw[stage]       1   producer, with the bytes of K's tile     waits: cleaner (warp 1)
//   named 1 + group  1 warpgroup                                  waits: all of it, before a store
#pragma once

#include "attention/sm90/backward.h"

namespace fused_attn::attention {

// Modified scores need registers for their derivatives: half as many keys with large heads.
template <class Element_, int kHeadDim_, bool kGeneral_>
struct DqConfig {
  using Element = Element_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroups = 2;
  static constexpr int kBlockM = kGroups * 64;
  static constexpr int kBlockN = kGeneral && kHeadDim > 96 ? 32 : 64;
  static constexpr int kStages = kHeadDim > 192 ? 1 : 2;
  static constexpr int kThreads = (kGroups + 1) * device::kWarpgroupThreads;
  static constexpr int kLaunchRegisters = 168;
  static constexpr int kProducerRegisters = kGeneral ? 56 : kHeadDim > 192 ? 24 : 40;
  static constexpr int kConsumerRegisters = kGeneral ? 224 : kHeadDim > 192 ? 240 : 232;

  using QTile = SharedTile<kBlockM, kHeadDim>;
  using KvTile = SharedTile<kBlockN, kHeadDim>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + QTile::kBytes;
  static constexpr uint32_t kK = kDout + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KvTile::kBytes;
  static constexpr uint32_t kBarriers = kV + kStages * KvTile::kBytes;
  static constexpr uint32_t kPadding = kBarriers + 128;
  // Of the row statistics: a base for each query, and whether any is not 0.
  static constexpr uint32_t kBases = kPadding + kMaxKeyBits / 8;
  static constexpr uint32_t kHasBase = kBases + 4 * kBlockM;
  static constexpr uint32_t kSharedBytes = kHasBase + 16 + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "the tiles exceed the shared memory of an SM");
};

struct DqMaps {
  TensorMap q, k, v, dout, dq;
};

template <class Config>
struct DqShared : SharedMap<Config> {
  using SharedMap<Config>::base;

  FUSED_ATTN_DEVICE SharedAddress dout() const { return base + Config::kDout; }
  FUSED_ATTN_DEVICE float base_of(int query) const {
    return device::shared_load_float(base + Config::kBases + 4 * query);
  }
  FUSED_ATTN_DEVICE bool has_base() const {
    return device::shared_load_word(base + Config::kHasBase) != 0;
  }
  // All threads; a barrier of the block must follow.
  FUSED_ATTN_DEVICE void fill_bases(const float* from, int count) const {
    const bool any = any_base<Config::kBlockM>(from, count);
    const int i = device::thread_index();
    if (i == 0) device::shared_store(base + Config::kHasBase, any ? 1u : 0u);
    if (i < Config::kBlockM) {
      device::shared_store(base + Config::kBases + 4 * i, i < count ? from[i] : 0.0f);
    }
  }
};

template <class Config>
class DqProducer {
 public:
  FUSED_ATTN_DEVICE DqProducer(const DqMaps& maps, const BackwardProblem& p,
                               const Block<Config>& block, const DqShared<Config>& shared)
      : maps_(maps), p_(p), block_(block), shared_(shared) {}

  FUSED_ATTN_DEVICE void load() const {
    const SequenceRows queries = query_rows(p_, block_.sequence, block_.head);
    device::barrier_expect(shared_.q_full(), 2 * Config::QTile::kBytes);
    load_panels<typename Config::QTile, Keep::kBriefly>(shared_.q(), maps_.q, shared_.q_full(),
                                                        queries, block_.query_begin);
    load_panels<typename Config::QTile, Keep::kBriefly>(
        shared_.dout(), maps_.dout, shared_.q_full(), queries, block_.query_begin);
    Ring<Config::kStages> ring;
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      const int stage = ring.stage;
      device::barrier_wait(shared_.k_empty(stage), ring.phase ^ 1);
      block_.load(p_, maps_.k, shared_.k(stage),
                  block_.hides_keys(p_, tile) ? shared_.raw(stage) : shared_.k_full(stage), tile);
      device::barrier_wait(shared_.v_empty(stage), ring.phase ^ 1);
      block_.load(p_, maps_.v, shared_.v(stage), shared_.v_full(stage), tile);
      ring.advance();
    }
  }

  // Hidden keys must not count in ds k, even multiplied by 0.
  FUSED_ATTN_DEVICE void clean() const {
    const auto k = [&](int stage) { return shared_.k(stage); };
    const auto raw = [&](int stage) { return shared_.raw(stage); };
    const auto full = [&](int stage) { return shared_.k_full(stage); };
    TileCleaner<Config, Block<Config>>(p_, block_).run(k, raw, full);
  }

 private:
  const DqMaps& maps_;
  const BackwardProblem& p_;
  const Block<Config>& block_;
  const DqShared<Config>& shared_;
};

template <class Config>
class DqConsumer : Consumer<Config, BackwardProblem> {
  using Base = Consumer<Config, BackwardProblem>;
  using Base::fragment_, Base::group_, Base::p_, Base::ring_, Base::thread_;
  using Base::release, Base::scale_log2;

 public:
  FUSED_ATTN_DEVICE DqConsumer(const DqMaps& maps, const BackwardProblem& p,
                               const Block<Config>& block, const DqShared<Config>& shared,
                               int group)
      : Base(p, group), maps_(maps), block_(block), shared_(shared) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Config::kHeadDim / 2; ++i) dq_[i] = 0.0f;
    FUSED_ATTN_UNROLL_LOOP
    for (int row = 0; row < 2; ++row) {
      const int i = query() + 8 * row;
      const bool there = i < block.sequence.seqlen_q;
      const int64_t at = statistics_at(p, block.sequence, block.head, i);
      lse2_.of[row] = there ? p.lse2[at] : device::infinity();
      delta_.of[row] = there ? p.delta[at] : 0.0f;
    }
  }

  FUSED_ATTN_DEVICE void run() {
    device::barrier_wait(shared_.q_full(), 0);
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      if (!kGeneral && block_.kind(tile) == TileKind::kPlain && !shared_.has_base()) {
        step<false>(tile);
      } else {
        step<true>(tile);
      }
      ring_.advance();
    }
    finish();
  }

 private:
  static constexpr bool kGeneral = Config::kGeneral;
  static constexpr int kBlockN = Config::kBlockN;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using RowProduct = device::Mma<typename Config::Element, kBlockN, false, false>;
  using DqProduct = device::Mma<typename Config::Element, Config::kHeadDim, false, true>;

  template <bool kMasked>
  FUSED_ATTN_DEVICE void step(int tile) {
    const int stage = ring_.stage;
    device::barrier_wait(shared_.k_full(stage), ring_.phase);
    issue(scores_, shared_.q(), shared_.k(stage));
    device::barrier_wait(shared_.v_full(stage), ring_.phase);
    issue(dp_, shared_.dout(), shared_.v(stage));
    device::mma_wait<1>();
    device::keep_in_registers(scores_);
    Slope<kGeneral ? kBlockN / 2 : 1> slope;
    const ScoreAt<false> at{block_.sequence.batch, block_.head, query(),
                            tile * kBlockN + fragment_.column};
    const auto hide = [&] {
      hide_by_band(scores_, at, block_.band);
      hide_by_padding(scores_, block_.padding, tile, fragment_.column);
    };
    const auto subtract = [&] {
      const int row = device::opaque(group_ * 64 + fragment_.row);
      const float base[2] = {shared_.base_of(row), shared_.base_of(row + 8)};
      subtract_base(scores_, [&](int i) { return base[i >> 1 & 1]; });
    };
    recompute_probabilities<Config, kMasked>(
        scores_, p_, at, block_, scale_log2(), slope, hide, [&](int) { return lse2_; },
        kMasked && shared_.has_base(), subtract);
    Base::finish_before_wait(scores_, shared_.q_full());
    device::mma_wait<0>();
    device::keep_in_registers(dp_);
    release(shared_.v_empty(stage));
    differentiate_scores<Config, kMasked, true>(scores_, dp_, packed_, p_, at, block_, slope,
                                                [&](int) { return delta_; });
    issue_factors<DqProduct, KvTile>(dq_, packed_, shared_.k(stage));
    device::mma_wait<0>();
    device::keep_in_registers(dq_);
    device::keep_in_registers(packed_);
    release(shared_.k_empty(stage));
  }

  // rows x keys^T: scores from q and k, dp from dout and v.
  FUSED_ATTN_DEVICE void issue(float (&to)[kBlockN / 2], SharedAddress rows, SharedAddress keys) {
    issue_rows<RowProduct, QTile, KvTile, Config::kHeadDim>(to, rows + group_ * 64 * kTileRowBytes,
                                                            keys);
  }

  FUSED_ATTN_DEVICE void finish() {
    if (p_.dq.data == nullptr) return;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Config::kHeadDim / 2; ++i) dq_[i] *= p_.scale;
    store_rows<typename Config::Element, QTile>(
        dq_, {maps_.dq, p_.dq, p_.dq_by_tile, p_.rows_q, p_.head_dim},
        query_rows(p_, block_.sequence, block_.head), block_.query_begin + group_ * 64, shared_.q(),
        group_ * 64, 1 + group_);
  }

  FUSED_ATTN_DEVICE int query() const { return block_.query_begin + group_ * 64 + fragment_.row; }

  const DqMaps& maps_;
  const Block<Config>& block_;
  const DqShared<Config>& shared_;
  QueryPair lse2_, delta_;
  float scores_[kBlockN / 2], dp_[kBlockN / 2];
  uint32_t packed_[kBlockN / 4];
  float dq_[Config::kHeadDim / 2];
};

template <class Config>
FUSED_ATTN_KERNEL(Config::kThreads)
dq_kernel(FUSED_ATTN_GRID_CONSTANT DqMaps maps, FUSED_ATTN_GRID_CONSTANT BackwardProblem p) {
  const DqShared<Config> shared;
  const Block<Config> block(p, device::block_index(), shared.padding());
  if (block.empty()) return;
  run_warpgroups<Config>(
      shared,
      [&] {
        block.fill_padding(p);
        shared.fill_bases(p.base + statistics_at(p, block.sequence, block.head, block.query_begin),
                          block.sequence.seqlen_q - block.query_begin);
      },
      [&](int warp) {
        const DqProducer<Config> producer(maps, p, block, shared);
        if (device::thread_index() == 0) producer.load();
        if (warp == 1) producer.clean();
      },
      [&](int group) { DqConsumer<Config>(maps, p, block, shared, group).run(); });
}

}  // namespace fused_attn::attention
