// The gradient of q (and of the bias) for sm_90: one block holds kBlockM queries of one head and
// walks over their keys, as the forward does.
#pragma once

#include "attention/sm90/backward.h"

namespace fused_attn::attention {

// Modified scores need registers for their derivatives: half as many keys with large heads.
template <class Element_, int kHeadDim_, bool kGeneral_>
struct DqTile {
  using Element = Element_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroups = 2;
  static constexpr int kBlockM = kGroups * 64;
  static constexpr int kBlockN = kGeneral && kHeadDim > 96 ? 32 : 64;
  static constexpr int kStages = kHeadDim > 192 ? 1 : 2;
  static constexpr int kThreads = (kGroups + 1) * device::kWarpgroupThreads;
  static constexpr int kLaunchRegisters = 168;
  static constexpr int kProducerRegisters = kGeneral ? 56 : 40;
  static constexpr int kConsumerRegisters = kGeneral ? 224 : 232;

  using QTile = SharedTile<kBlockM, kHeadDim>;
  using KvTile = SharedTile<kBlockN, kHeadDim>;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kDout = kQ + QTile::kBytes;
  static constexpr uint32_t kK = kDout + QTile::kBytes;
  static constexpr uint32_t kV = kK + kStages * KvTile::kBytes;
  static constexpr uint32_t kBarriers = kV + kStages * KvTile::kBytes;
  static constexpr uint32_t kPadding = kBarriers + 128;
  static constexpr uint32_t kSharedBytes = kPadding + kMaxKeyBits / 8 + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "the tiles exceed the shared memory of an SM");
};

struct DqMaps {
  TensorMap q, k, v, dout, dq;
};

template <class Tile>
struct DqShared : SharedMap<Tile> {
  FUSED_ATTN_DEVICE SharedAddress dout() const { return this->base + Tile::kDout; }
};

template <class Tile>
class DqProducer {
 public:
  FUSED_ATTN_DEVICE DqProducer(const DqMaps& maps, const BackwardProblem& p,
                               const Block<Tile>& block, const DqShared<Tile>& shared)
      : maps_(maps), p_(p), block_(block), shared_(shared) {}

  FUSED_ATTN_DEVICE void load() const {
    const RaggedRows queries = query_rows(p_, block_.sequence, block_.head);
    device::barrier_expect(shared_.q_full(), 2 * Tile::QTile::kBytes);
    load_panels<typename Tile::QTile, Keep::kBriefly>(shared_.q(), maps_.q, shared_.q_full(),
                                                      queries, block_.query_begin);
    load_panels<typename Tile::QTile, Keep::kBriefly>(shared_.dout(), maps_.dout, shared_.q_full(),
                                                      queries, block_.query_begin);
    Ring<Tile::kStages> ring;
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
    TileCleaner<Tile, Block<Tile>>(p_, block_).run(k, raw, full);
  }

 private:
  const DqMaps& maps_;
  const BackwardProblem& p_;
  const Block<Tile>& block_;
  const DqShared<Tile>& shared_;
};

template <class Tile>
class DqConsumer {
 public:
  FUSED_ATTN_DEVICE DqConsumer(const DqMaps& maps, const BackwardProblem& p,
                               const Block<Tile>& block, const DqShared<Tile>& shared, int group)
      : maps_(maps),
        p_(p),
        block_(block),
        shared_(shared),
        group_(group),
        thread_(device::thread_index() % device::kWarpgroupThreads),
        fragment_(thread_) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) dq_[i] = 0.0f;
    FUSED_ATTN_UNROLL_LOOP
    for (int row = 0; row < 2; ++row) {
      const int i = query() + 8 * row;
      const bool there = i < block.sequence.seqlen_q;
      const int64_t at =
          int64_t{block.head} * p.padded_rows + statistics_start(p, block.sequence) + i;
      lse2_[row] = there ? p.lse2[at] : device::infinity();
      delta_[row] = there ? p.delta[at] : 0.0f;
    }
  }

  FUSED_ATTN_DEVICE void run() {
    device::barrier_wait(shared_.q_full(), 0);
    FUSED_ATTN_KEEP_LOOP
    for (int tile = block_.next(block_.tiles.end); tile >= block_.tiles.begin;
         tile = block_.next(tile)) {
      if (!kGeneral && block_.kind(tile) == TileKind::kPlain) {
        step<false>(tile);
      } else {
        step<true>(tile);
      }
      ring_.advance();
    }
    finish();
  }

 private:
  static constexpr bool kGeneral = Tile::kGeneral;
  static constexpr int kBlockN = Tile::kBlockN;
  using QTile = typename Tile::QTile;
  using KvTile = typename Tile::KvTile;
  using RowProduct = device::Mma<typename Tile::Element, kBlockN, false, false>;
  using DqProduct = device::Mma<typename Tile::Element, Tile::kHeadDim, false, true>;

  template <bool kMasked>
  FUSED_ATTN_DEVICE void step(int tile) {
    const int stage = ring_.stage;
    device::barrier_wait(shared_.k_full(stage), ring_.phase);
    issue_rows(scores_, shared_.q(), shared_.k(stage));
    device::barrier_wait(shared_.v_full(stage), ring_.phase);
    issue_rows(dp_, shared_.dout(), shared_.v(stage));
    device::mma_wait<1>();
    device::pin(scores_);
    Slope<kGeneral ? kBlockN / 2 : 1> slope;
    const ScoreAt<false> at{block_.sequence.batch, block_.head, query(),
                            tile * kBlockN + fragment_.column};
    recompute<kMasked>(tile, at, slope);
    device::mma_wait<0>();
    device::pin(dp_);
    release(shared_.v_empty(stage));
    differentiate<kMasked>(at, slope);
    issue_dq(stage);
    device::mma_wait<0>();
    device::pin(dq_);
    device::pin(packed_);
    release(shared_.k_empty(stage));
  }

  // rows x keys^T: scores from q and k, dp from dout and v.
  FUSED_ATTN_DEVICE void issue_rows(float (&to)[kBlockN / 2], SharedAddress rows,
                                    SharedAddress keys) {
    const uint64_t a = QTile::by_rows(rows + group_ * 64 * kTileRowBytes);
    const uint64_t b = KvTile::by_rows(keys);
    device::mma_fence();
    FUSED_ATTN_UNROLL_LOOP
    for (int k = 0; k < Tile::kHeadDim / 16; ++k) {
      RowProduct::from_shared(to, a + QTile::row_step(k), b + KvTile::row_step(k), k != 0);
    }
    device::mma_commit();
  }

  FUSED_ATTN_DEVICE void issue_dq(int stage) {
    const uint64_t k = KvTile::by_columns(shared_.k(stage));
    device::pin(packed_);
    device::mma_fence();
    FUSED_ATTN_UNROLL_LOOP
    for (int s = 0; s < kBlockN / 16; ++s) {
      DqProduct::from_registers(dq_, packed_[4 * s], packed_[4 * s + 1], packed_[4 * s + 2],
                                packed_[4 * s + 3], k + KvTile::column_step(s), true);
    }
    device::mma_commit();
  }

  // scores -> probabilities; what dropout drops is negative.
  template <bool kMasked, class SlopeOf>
  FUSED_ATTN_DEVICE void recompute(int tile, const ScoreAt<false>& at, SlopeOf& slope) {
    if constexpr (kGeneral) {
      modify_scores<typename Tile::Element>(scores_, p_, at, block_.band, block_.sequence, slope);
      hide_by_mask(scores_, p_, at, block_.band);
    }
    if constexpr (kMasked) {
      hide_by_band(scores_, at, block_.band);
      hide_by_padding(scores_, block_.padding, tile, fragment_.column);
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kBlockN / 2; ++i) {
      scores_[i] = probability(scores_[i], multiplier(), lse2_[i >> 1 & 1]);
    }
    if constexpr (kGeneral) {
      if (p_.rng != nullptr) drop<true>(scores_, p_, at);
    }
  }

  // scores -> ds, packed
  template <bool kMasked, class SlopeOf>
  FUSED_ATTN_DEVICE void differentiate(const ScoreAt<false>& at, const SlopeOf& slope) {
    const float keep_scale = kGeneral ? p_.keep_scale : 1.0f;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kBlockN / 2; ++i) {
      scores_[i] =
          score_gradient<kMasked, kGeneral>(scores_[i], dp_[i], delta_[i >> 1 & 1], keep_scale);
    }
    if constexpr (kGeneral) {
      if (p_.dbias != nullptr) add_to_bias(scores_, p_, at, block_.band);
      if (p_.softcap > 0.0f) {
        FUSED_ATTN_UNROLL_LOOP
        for (int i = 0; i < kBlockN / 2; ++i) scores_[i] *= slope.value[i];
      }
    }
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kBlockN / 4; ++i) {
      packed_[i] = Tile::Element::pack(scores_[2 * i], scores_[2 * i + 1]);
    }
  }

  FUSED_ATTN_DEVICE void finish() {
    if (p_.dq.data == nullptr) return;
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Tile::kHeadDim / 2; ++i) dq_[i] *= p_.scale;
    const int row = block_.query_begin + group_ * 64;
    if (!p_.dq_by_tile) {
      store_elements<typename Tile::Element>(
          dq_, p_.dq, query_rows(p_, block_.sequence, block_.head), p_.rows_q, p_.head_dim, row);
      return;
    }
    fragment_to_tile<typename Tile::Element, QTile>(dq_, shared_.q(), group_ * 64);
    device::fence_async();
    device::named_sync(1 + group_, device::kWarpgroupThreads);
    if (thread_ != 0) return;
    store_panels<QTile>(maps_.dq, shared_.q(), group_ * 64,
                        query_rows(p_, block_.sequence, block_.head), row);
  }

  // Of scores, to come to base 2.
  FUSED_ATTN_DEVICE float multiplier() const { return kGeneral ? 1.0f : p_.scale_log2; }
  FUSED_ATTN_DEVICE void release(SharedAddress empty) const {
    if (thread_ == 0) device::barrier_arrive(empty);
  }
  FUSED_ATTN_DEVICE int query() const { return block_.query_begin + group_ * 64 + fragment_.row; }

  const DqMaps& maps_;
  const BackwardProblem& p_;
  const Block<Tile>& block_;
  const DqShared<Tile>& shared_;
  int group_, thread_;
  Fragment fragment_;
  Ring<Tile::kStages> ring_;
  float lse2_[2], delta_[2];
  float scores_[kBlockN / 2], dp_[kBlockN / 2];
  uint32_t packed_[kBlockN / 4];
  float dq_[Tile::kHeadDim / 2];
};

template <class Tile>
FUSED_ATTN_KERNEL(Tile::kThreads)
dq_kernel(FUSED_ATTN_GRID_CONSTANT DqMaps maps, FUSED_ATTN_GRID_CONSTANT BackwardProblem p) {
  const DqShared<Tile> shared;
  const Block<Tile> block(p, device::block_index(), shared.padding());
  if (block.empty()) return;
  const int group = device::shuffle(device::thread_index() / device::kWarpgroupThreads, 0);
  if (device::thread_index() == 0) shared.init_barriers();
  block.fill_padding(p);
  device::sync_block();
  if (group == 0) {
    device::lower_registers<Tile::kProducerRegisters>();
    const DqProducer<Tile> producer(maps, p, block, shared);
    const int warp = device::thread_index() / device::kWarpThreads;
    if (device::thread_index() == 0) producer.load();
    if (warp == 1) producer.clean();
  } else {
    device::raise_registers<Tile::kConsumerRegisters>();
    DqConsumer<Tile> consumer(maps, p, block, shared, group - 1);
    consumer.run();
  }
}

}  // namespace fused_attn::attention
