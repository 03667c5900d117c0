// The gradients of k and v for sm_90: one block holds a block of keys of one key head and walks
// over the queries of all the query heads that share it.
//
// Scores are computed transposed, keys by queries: the fragments of p^T and ds^T are then operands
// of dv = p^T dout and dk = ds^T q as they are (Shah et al., "FlashAttention-3", 2024).
//
// Barriers, and how often each must be arrived at:
//   kv_full             1   producer, with the bytes of k and v             waits: consumers, once
//   q_full[stage]       1   producer, with the bytes of q and lse           waits: consumers
//   q_empty[stage]      4 kGroups   each warp of each consumer              waits: producer
//   dout_full[stage]    1   producer, with the bytes of dout and delta      waits: consumers
//   dout_empty[stage]   4 kGroups   each warp of each consumer              waits: producer
//   named 1 + group     1 warpgroup                      waits: all of it, before a store
//   named 1 + kGroups   both consumers                   waits: both, when ds^T or k is handed over
#pragma once

#include "attention/sm90/dq_sum.h"
#include "attention/sm90/key_block.h"

namespace fused_attn::attention {

// Two consumer warpgroups. Up to head size 128 each holds 64 keys, with dk and dv in registers;
// above it both hold the same 64 keys, one dv and the other dk. Modified scores need registers for
// their derivatives: fewer queries at a time. `kDq`: dq (and dbias) are added up, too, above head
// size 128 by the warpgroup that holds dv.
template <class Element_, int kHeadDim_, bool kGeneral_, bool kDq_>
struct DkDvConfig {
  using Element = Element_;
  static constexpr bool kGeneral = kGeneral_;
  static constexpr bool kDq = kDq_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kSplit = kHeadDim > 128;
  static constexpr int kGroups = 2;
  static constexpr int kBlockN = kSplit ? 64 : 128;
  static constexpr int kBlockM = !kGeneral ? 64 : kHeadDim > 192 ? 16 : 32;
  static constexpr int kStages = 2;
  static constexpr int kThreads = (kGroups + 1) * device::kWarpgroupThreads;
  static constexpr int kLaunchRegisters = 168;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using KvTile = SharedTile<kBlockN, kHeadDim>;
  using QTile = SharedTile<kBlockM, kHeadDim>;
  static constexpr int kStatisticsBytes = kBlockM * 4;
  static constexpr uint32_t kK = 0;
  static constexpr uint32_t kV = kK + KvTile::kBytes;
  static constexpr uint32_t kQ = kV + KvTile::kBytes;
  static constexpr uint32_t kDout = kQ + kStages * QTile::kBytes;
  // Of dq only: ds^T by stage, and a place for each warp's part of dq on its way out.
  // Up to 64 columns the warpgroups share the queries, each with a panel of its own: nobody says
  // that a transposed operand may begin within a swizzle.
  static constexpr bool kDqByQueries = kHeadDim <= kTileColumns;
  static constexpr int kDqQueries = kDqByQueries ? kBlockM / kGroups : kBlockM;
  struct DsTile : SharedTile<kBlockN, kDqByQueries ? kGroups * kTileColumns : kBlockM> {
    static FUSED_ATTN_DEVICE SharedAddress chunk(SharedAddress tile, int row, int query) {
      return SharedTile<kBlockN, kTileColumns>::chunk(
          tile, row, query / kDqQueries * kTileColumns + query % kDqQueries);
    }
  };
  static constexpr int kDqWarps = kSplit ? 4 : 8;
  static constexpr int kDqStageBytes = kSliceColumns * kDqQueries * 4;
  static constexpr uint32_t kDs = kDout + kStages * QTile::kBytes;
  static constexpr uint32_t kDqStage = kDs + (kDq ? kStages * DsTile::kBytes : 0);
  static constexpr uint32_t kLse = kDqStage + (kDq ? kDqWarps * kDqStageBytes : 0);
  static constexpr uint32_t kDelta = kLse + kStages * kStatisticsBytes;
  static constexpr uint32_t kBarriers = kDelta + kStages * kStatisticsBytes;
  // Of bool masks: a word for each head of the group (one for all if they share the mask) and each
  // tile of queries, as far as there is room.
  static constexpr int kMaxMaskWords = kGeneral ? 4096 : 0;
  static constexpr uint32_t kMaskWords = kBarriers + 128;
  static constexpr uint32_t kSharedBytes = kMaskWords + 4 * kMaxMaskWords + 1024;
  static_assert(kSharedBytes <= 227 * 1024, "the tiles exceed the shared memory of an SM");
};

struct DkDvMaps {
  TensorMap q, k, v, dout, dk, dv;
};

template <class Config>
struct DkDvShared : SharedBase<Config> {
  using SharedBase<Config>::base;

  FUSED_ATTN_DEVICE SharedAddress k() const { return base + Config::kK; }
  FUSED_ATTN_DEVICE SharedAddress v() const { return base + Config::kV; }
  FUSED_ATTN_DEVICE SharedAddress q(int stage) const {
    return base + Config::kQ + stage * Config::QTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress dout(int stage) const {
    return base + Config::kDout + stage * Config::QTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress lse(int stage) const {
    return base + Config::kLse + stage * Config::kStatisticsBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress ds(int stage) const {
    return base + Config::kDs + stage * Config::DsTile::kBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress dq_stage() const { return base + Config::kDqStage; }
  FUSED_ATTN_DEVICE SharedAddress delta(int stage) const {
    return base + Config::kDelta + stage * Config::kStatisticsBytes;
  }
  FUSED_ATTN_DEVICE SharedAddress mask_words() const { return base + Config::kMaskWords; }
  FUSED_ATTN_DEVICE SharedAddress kv_full() const { return this->first_barrier(); }
  FUSED_ATTN_DEVICE SharedAddress q_full(int stage) const { return this->barrier(0, stage); }
  FUSED_ATTN_DEVICE SharedAddress q_empty(int stage) const { return this->barrier(1, stage); }
  FUSED_ATTN_DEVICE SharedAddress dout_full(int stage) const { return this->barrier(2, stage); }
  FUSED_ATTN_DEVICE SharedAddress dout_empty(int stage) const { return this->barrier(3, stage); }

  // The consumers read the statistics of a stage with plain loads.
  static constexpr int kConsumerWarps =
      Config::kGroups * device::kWarpgroupThreads / device::kWarpThreads;

  FUSED_ATTN_DEVICE void init_barriers() const {
    device::barrier_init(kv_full(), 1, "kv_full");
    for (int stage = 0; stage < Config::kStages; ++stage) {
      device::barrier_init(q_full(stage), 1, "q_full");
      device::barrier_init(q_empty(stage), kConsumerWarps, "q_empty");
      device::barrier_init(dout_full(stage), 1, "dout_full");
      device::barrier_init(dout_empty(stage), kConsumerWarps, "dout_empty");
    }
    device::fence_barrier_init();
  }
};

template <class Config>
class DkDvProducer {
 public:
  FUSED_ATTN_DEVICE DkDvProducer(const DkDvMaps& maps, const BackwardProblem& p,
                                 const KeyBlock<Config>& block, const DkDvShared<Config>& shared)
      : maps_(maps), p_(p), block_(block), shared_(shared) {}

  FUSED_ATTN_DEVICE void load() const {
    const SequenceRows keys = key_rows(p_, block_.sequence, block_.band, block_.head_kv);
    device::barrier_expect(shared_.kv_full(), 2 * Config::KvTile::kBytes);
    load_panels<typename Config::KvTile, Keep::kBriefly>(shared_.k(), maps_.k, shared_.kv_full(),
                                                         keys, block_.key_begin);
    load_panels<typename Config::KvTile, Keep::kBriefly>(shared_.v(), maps_.v, shared_.kv_full(),
                                                         keys, block_.key_begin);
    Ring<Config::kStages> ring;
    FUSED_ATTN_KEEP_LOOP
    for (int g = 0; g < p_.group; ++g) {
      FUSED_ATTN_KEEP_LOOP
      for (int tile = block_.tiles.begin; tile < block_.tiles.end; ++tile) {
        if (block_.mask_hides(p_, shared_.mask_words(), g, tile)) continue;
        load_queries(block_.head_kv * p_.group + g, tile, ring);
        ring.advance();
      }
    }
  }

 private:
  FUSED_ATTN_DEVICE void load_queries(int head, int tile, const Ring<Config::kStages>& ring) const {
    const SequenceRows queries = query_rows(p_, block_.sequence, head);
    const int row = tile * Config::kBlockM, stage = ring.stage;
    const int64_t statistics = statistics_at(p_, block_.sequence, head, row);
    const uint32_t bytes = Config::QTile::kBytes + Config::kStatisticsBytes;
    device::barrier_wait(shared_.q_empty(stage), ring.phase ^ 1);
    device::barrier_expect(shared_.q_full(stage), bytes);
    load_panels<typename Config::QTile, Keep::kLong>(shared_.q(stage), maps_.q,
                                                     shared_.q_full(stage), queries, row);
    device::load_bulk(shared_.lse(stage), p_.lse2 + statistics, Config::kStatisticsBytes,
                      shared_.q_full(stage));
    device::barrier_wait(shared_.dout_empty(stage), ring.phase ^ 1);
    device::barrier_expect(shared_.dout_full(stage), bytes);
    load_panels<typename Config::QTile, Keep::kLong>(shared_.dout(stage), maps_.dout,
                                                     shared_.dout_full(stage), queries, row);
    device::load_bulk(shared_.delta(stage), p_.delta + statistics, Config::kStatisticsBytes,
                      shared_.dout_full(stage));
  }

  const DkDvMaps& maps_;
  const BackwardProblem& p_;
  const KeyBlock<Config>& block_;
  const DkDvShared<Config>& shared_;
};

template <class Config>
class DkDvConsumer : Consumer<Config, BackwardProblem> {
  using Base = Consumer<Config, BackwardProblem>;
  using Base::fragment_, Base::group_, Base::p_, Base::ring_, Base::thread_;
  using Base::release_by_warps, Base::scale_log2;

 public:
  FUSED_ATTN_DEVICE DkDvConsumer(const DkDvMaps& maps, const BackwardProblem& p,
                                 const KeyBlock<Config>& block, const DkDvShared<Config>& shared,
                                 int group)
      : Base(p, group),
        maps_(maps),
        block_(block),
        shared_(shared),
        row_(Config::kSplit ? 0 : group * 64) {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < Config::kHeadDim / 2; ++i) dk_[i] = 0.0f;
    if constexpr (!Config::kSplit) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < Config::kHeadDim / 2; ++i) dv_[i] = 0.0f;
    }
    lowest_query_ = block.band.lowest_query(key());
    FUSED_ATTN_UNROLL_LOOP
    for (int row = 0; row < 2; ++row) {
      const int key = this->key() + 8 * row;
      end_query_[row] = block.padded(p, key) ? 0 : block.band.end_query(key);
    }
  }

  FUSED_ATTN_DEVICE void run() {
    device::barrier_wait(shared_.kv_full(), 0);
    if (Config::kDq && block_.hides_keys(p_)) clean_keys();
    // Padding anywhere in the block: every tile needs masks.
    const bool padded = p_.key_padding != nullptr;
    FUSED_ATTN_KEEP_LOOP
    for (int g = 0; g < p_.group; ++g) {
      head_ = block_.head_kv * p_.group + g;
      FUSED_ATTN_KEEP_LOOP
      for (int tile = block_.tiles.begin; tile < block_.tiles.end; ++tile) {
        if (block_.mask_hides(p_, shared_.mask_words(), g, tile)) continue;
        if (!kGeneral && !padded && block_.tiles.plain(tile)) {
          step<false>(tile);
        } else {
          step<true>(tile);
        }
        ring_.advance();
      }
    }
    finish();
  }

 private:
  static constexpr bool kGeneral = Config::kGeneral;
  static constexpr int kBlockM = Config::kBlockM;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using RowProduct = device::Mma<typename Config::Element, kBlockM, false, false>;
  using GradientProduct = device::Mma<typename Config::Element, Config::kHeadDim, false, true>;

  // Hidden keys must not count in ds k, even multiplied by 0.
  FUSED_ATTN_DEVICE void clean_keys() const {
    constexpr int kRows = Config::kBlockN / (4 * Config::kGroups);  // a warp
    const int begin = (group_ * 4 + thread_ / device::kWarpThreads) * kRows;
    TileCleaner<Config, KeyBlock<Config>>(p_, block_)
        .clean(shared_.k(), block_.key_begin, begin, begin + kRows);
    device::fence_async();
    device::named_sync(kBothBarrier, 2 * device::kWarpgroupThreads);
  }

  template <bool kMasked>
  FUSED_ATTN_DEVICE void step(int tile) {
    if constexpr (Config::kSplit) {
      if (group_ == 0) {
        step_dv<kMasked>(tile);
      } else {
        step_dk<kMasked>(tile);
      }
    } else {
      step_both<kMasked>(tile);
    }
  }

  template <bool kMasked>
  FUSED_ATTN_DEVICE void step_both(int tile) {
    const int stage = ring_.stage;
    const ScoreAt<true> at = place(tile);
    Slope<kGeneral ? kBlockM / 2 : 1> slope;
    issue_scores();
    issue_dp();
    const float* const base = base_of(tile);
    device::mma_wait<1>();
    device::keep_in_registers(scores_);
    recompute<kMasked>(at, base, slope);
    pack_probabilities();
    Base::finish_before_wait(probabilities_, shared_.kv_full());
    device::mma_wait<0>();
    device::keep_in_registers(dp_);
    issue_gradient(dv_, probabilities_, shared_.dout(stage));
    differentiate<kMasked>(at, slope);
    hand_over_ds(stage);
    issue_gradient(dk_, packed_, shared_.q(stage));
    typename DqAdder<Config>::Accumulator dq;
    if constexpr (Config::kDq) {
      device::named_sync(kBothBarrier, 2 * device::kWarpgroupThreads);
      const int panel = Config::kDqByQueries ? 0 : group_;
      DqAdder<Config>::issue(dq, shared_.k(), shared_.ds(stage), panel, group_);
      device::mma_wait<1>();
    } else {
      device::mma_wait<0>();
    }
    device::keep_in_registers(dv_);
    device::keep_in_registers(dk_);
    device::keep_in_registers(probabilities_);
    device::keep_in_registers(packed_);
    release_by_warps(shared_.dout_empty(stage));
    release_by_warps(shared_.q_empty(stage));
    if constexpr (Config::kDq) {
      device::mma_wait<0>();
      device::keep_in_registers(dq);
      const int panel = Config::kDqByQueries ? 0 : group_;
      DqAdder<Config>::add(dq, p_, block_.sequence, head_, tile, panel, group_, shared_.dq_stage());
    }
  }

  // The accumulator is called dk_ in both warpgroups: this one's is dv.
  template <bool kMasked>
  FUSED_ATTN_DEVICE void step_dv(int tile) {
    const int stage = ring_.stage;
    const ScoreAt<true> at = place(tile);
    NoSlope unwanted;
    issue_scores();
    const float* const base = base_of(tile);
    device::mma_wait<0>();
    device::keep_in_registers(scores_);
    recompute<kMasked>(at, base, unwanted);
    pack_probabilities();
    device::barrier_wait(shared_.dout_full(stage), ring_.phase);
    issue_gradient(dk_, probabilities_, shared_.dout(stage));
    if constexpr (Config::kDq) device::named_sync(kBothBarrier, 2 * device::kWarpgroupThreads);
    device::mma_wait<0>();
    device::keep_in_registers(dk_);
    device::keep_in_registers(probabilities_);
    release_by_warps(shared_.q_empty(stage));
    release_by_warps(shared_.dout_empty(stage));
    if constexpr (Config::kDq) {
      FUSED_ATTN_KEEP_LOOP
      for (int panel = 0; panel < Config::KvTile::kPanels; ++panel) {
        typename DqAdder<Config>::Accumulator dq;
        DqAdder<Config>::issue(dq, shared_.k(), shared_.ds(stage), panel, group_);
        device::mma_wait<0>();
        device::keep_in_registers(dq);
        DqAdder<Config>::add(dq, p_, block_.sequence, head_, tile, panel, group_,
                             shared_.dq_stage());
      }
    }
  }

  template <bool kMasked>
  FUSED_ATTN_DEVICE void step_dk(int tile) {
    const int stage = ring_.stage;
    const ScoreAt<true> at = place(tile);
    Slope<kGeneral ? kBlockM / 2 : 1> slope;
    issue_scores();
    issue_dp();
    const float* const base = base_of(tile);
    device::mma_wait<1>();
    device::keep_in_registers(scores_);
    recompute<kMasked>(at, base, slope);
    Base::finish_before_wait(scores_, shared_.kv_full());
    device::mma_wait<0>();
    device::keep_in_registers(dp_);
    differentiate<kMasked>(at, slope);
    hand_over_ds(stage);
    issue_gradient(dk_, packed_, shared_.q(stage));
    if constexpr (Config::kDq) device::named_sync(kBothBarrier, 2 * device::kWarpgroupThreads);
    device::mma_wait<0>();
    device::keep_in_registers(dk_);
    device::keep_in_registers(packed_);
    release_by_warps(shared_.dout_empty(stage));
    release_by_warps(shared_.q_empty(stage));
  }

  // Before the warpgroups meet.
  FUSED_ATTN_DEVICE void hand_over_ds(int stage) const {
    if constexpr (!Config::kDq) return;
    packed_to_tile<typename Config::DsTile>(packed_, shared_.ds(stage), row_);
    device::fence_async();
  }

  FUSED_ATTN_DEVICE void issue_scores() {
    device::barrier_wait(shared_.q_full(ring_.stage), ring_.phase);
    issue(scores_, shared_.k(), shared_.q(ring_.stage));
  }
  FUSED_ATTN_DEVICE void issue_dp() {
    device::barrier_wait(shared_.dout_full(ring_.stage), ring_.phase);
    issue(dp_, shared_.v(), shared_.dout(ring_.stage));
  }

  // keys x rows^T: scores from k and q, dp from v and dout.
  FUSED_ATTN_DEVICE void issue(float (&to)[kBlockM / 2], SharedAddress keys, SharedAddress rows) {
    issue_rows<RowProduct, KvTile, QTile, Config::kHeadDim>(to, keys + row_ * kTileRowBytes, rows);
  }

  // to += factors x rows: dv from p^T and dout, dk from ds^T and q.
  FUSED_ATTN_DEVICE void issue_gradient(float (&to)[Config::kHeadDim / 2],
                                        uint32_t (&factors)[kBlockM / 4], SharedAddress rows) {
    issue_factors<GradientProduct, QTile>(to, factors, rows);
  }

  // scores -> probabilities
  template <bool kMasked, class SlopeOf>
  FUSED_ATTN_DEVICE void recompute(const ScoreAt<true>& at, const float* base, SlopeOf& slope) {
    const SharedAddress lse = shared_.lse(ring_.stage);
    recompute_probabilities<Config, kMasked>(
        scores_, p_, at, block_, scale_log2(), slope, [&] { hide_by_band(scores_, at); },
        [&](int i) { return statistic(lse, i); }, base != nullptr,
        [&] {
          subtract_base(scores_, [&](int i) { return base[ScoreAt<true>::query_offset(i)]; });
        });
  }

  // The bases of this thread's queries; null where those of the tile are all 0.
  FUSED_ATTN_DEVICE const float* base_of(int tile) const {
    const float* base = p_.base + statistics_at(p_, block_.sequence, head_, tile * kBlockM);
    return any_base<kBlockM>(base, kBlockM) ? base + fragment_.column : nullptr;
  }

  FUSED_ATTN_DEVICE void pack_probabilities() {
    FUSED_ATTN_UNROLL_LOOP
    for (int i = 0; i < kBlockM / 4; ++i) {
      probabilities_[i] = Config::Element::pack(kept(scores_[2 * i]), kept(scores_[2 * i + 1]));
    }
  }
  static FUSED_ATTN_DEVICE float kept(float p) { return kGeneral && p < 0.0f ? 0.0f : p; }

  // probabilities -> ds, packed
  template <bool kMasked, class SlopeOf>
  FUSED_ATTN_DEVICE void differentiate(const ScoreAt<true>& at, const SlopeOf& slope) {
    const SharedAddress delta = shared_.delta(ring_.stage);
    differentiate_scores<Config, kMasked, Config::kDq>(scores_, dp_, packed_, p_, at, block_, slope,
                                                       [&](int i) { return statistic(delta, i); });
  }

  // Of the queries of registers `i` and `i` + 1.
  FUSED_ATTN_DEVICE QueryPair statistic(SharedAddress row, int i) const {
    const SharedAddress at = row + 4 * (fragment_.column + ScoreAt<true>::along(i));
    return {device::shared_load_float(at), device::shared_load_float(at + 4)};
  }

  FUSED_ATTN_DEVICE void finish() {
    if (Config::kDq) device::wait_stores();
    const float keep_scale = kGeneral ? p_.keep_scale : 1.0f;
    if constexpr (Config::kSplit) {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < Config::kHeadDim / 2; ++i) dk_[i] *= group_ == 0 ? keep_scale : p_.scale;
      if (group_ == 0) {
        store(dk_, maps_.dv, p_.dv, p_.dv_by_tile, p_.head_dim_v, shared_.v());
      } else {
        store(dk_, maps_.dk, p_.dk, p_.dk_by_tile, p_.head_dim, shared_.k());
      }
    } else {
      FUSED_ATTN_UNROLL_LOOP
      for (int i = 0; i < Config::kHeadDim / 2; ++i) {
        dv_[i] *= keep_scale;
        dk_[i] *= p_.scale;
      }
      store(dv_, maps_.dv, p_.dv, p_.dv_by_tile, p_.head_dim_v, shared_.v());
      store(dk_, maps_.dk, p_.dk, p_.dk_by_tile, p_.head_dim, shared_.k());
    }
  }

  // Through the place of k or v in shared memory. Split, and for dq, the other warpgroup reads k as
  // well, so both must have read it for good.
  FUSED_ATTN_DEVICE void store(const float (&x)[Config::kHeadDim / 2], const TensorMap& map,
                               const DeviceView& view, bool by_tile, int columns,
                               SharedAddress tile) {
    if (Config::kSplit || Config::kDq) {
      device::named_sync(kBothBarrier, 2 * device::kWarpgroupThreads);
    }
    if (view.data == nullptr) return;
    // Worked out again: the loop over queries had no registers for it.
    const KeyBlock<Config> block(p_, device::block_index());
    const Sequence& s = block.sequence;
    // All keys, those that nobody sees too: their gradient is 0.
    const SequenceRows rows{p_.cu_seqlens_k != nullptr, s.start_k, s.seqlen_k, block.head_kv,
                            s.tensor_batch};
    store_rows<typename Config::Element, KvTile>(x, {map, view, by_tile, p_.rows_k, columns}, rows,
                                                 block.key_begin + row_, tile, row_, 1 + group_);
  }

  FUSED_ATTN_DEVICE ScoreAt<true> place(int tile) const {
    return {block_.sequence.batch,
            head_,
            tile * kBlockM + fragment_.column,
            kGeneral ? device::opaque(key()) : key(),
            lowest_query_,
            {end_query_[0], end_query_[1]}};
  }
  FUSED_ATTN_DEVICE int key() const { return block_.key_begin + row_ + fragment_.row; }

  static constexpr int kBothBarrier = 1 + Config::kGroups;

  const DkDvMaps& maps_;
  const KeyBlock<Config>& block_;
  const DkDvShared<Config>& shared_;
  int row_, head_;
  int lowest_query_, end_query_[2];  // of ScoreAt
  float scores_[kBlockM / 2], dp_[kBlockM / 2];
  uint32_t probabilities_[kBlockM / 4], packed_[kBlockM / 4];
  float dk_[Config::kHeadDim / 2], dv_[Config::kSplit ? 1 : Config::kHeadDim / 2];
};

template <class Config>
FUSED_ATTN_KERNEL(Config::kThreads)
dkdv_kernel(FUSED_ATTN_GRID_CONSTANT DkDvMaps maps, FUSED_ATTN_GRID_CONSTANT BackwardProblem p) {
  const DkDvShared<Config> shared;
  const KeyBlock<Config> block(p, device::block_index());
  if (block.empty()) return;
  run_warpgroups<Config>(
      shared, [&] { block.find_hidden(p, shared.mask_words()); },
      [&](int) {
        if (device::thread_index() == 0) DkDvProducer<Config>(maps, p, block, shared).load();
      },
      [&](int group) { DkDvConsumer<Config>(maps, p, block, shared, group).run(); });
}

}  // namespace fused_attn::attention
