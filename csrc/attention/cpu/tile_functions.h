// Masks and changes of scores that are functions of pairs (attention/functions.h), on tiles.
#pragma once

#include "attention/cpu/interpreter.h"
#include "attention/cpu/score.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

struct FunctionBuffers {
  struct Registers {
    Buffer reals, ints;
  };
  Registers mask, score, sums;
};

// The functions of one head; without any, all of it is idle.
template <class Real>
class TileFunctions {
 public:
  TileFunctions(const Params& p, const Sequence& sequence, int64_t head, FunctionBuffers& buffers)
      : p_(p), sequence_(sequence), head_(head) {
    if (p.functions == nullptr) return;
    const Real scale = static_cast<Real>(p.scale);
    const auto start = [&](const PairProgram& program, FunctionBuffers::Registers& registers) {
      if (!program) return Interpreter<Real>();
      return Interpreter<Real>(*p.functions, program, sequence, head, scale, registers.reals,
                               registers.ints);
    };
    mask_ = start(p.functions->mask, buffers.mask);
    score_ = start(p.functions->score, buffers.score);
    sums_ = start(p.functions->sums, buffers.sums);
  }

  bool hides() const { return mask_ || (p_.functions != nullptr && p_.functions->kinds.data); }
  bool has_slope() const { return score_ && score_.has_slope(); }
  bool sums() const { return static_cast<bool>(sums_); }

  void select_queries(int64_t first, int rows) {
    if (mask_) mask_.select_queries(first, rows);
    if (score_) score_.select_queries(first, rows);
    if (sums_) sums_.select_queries(first, rows);
  }

  // Hides of a tile what the list of blocks and the mask hide.
  void hide(int64_t i, int rows, int64_t j, TileMap& map) {
    const uint64_t valid = Visibility::lanes_below(rows);
    if (map.seen == Seen::kAll) {
      for (int c = 0; c < map.keys; ++c) map.visible[c] = valid;
    }
    const bool listed = p_.functions->kinds.data != nullptr;
    for (int begin = 0, end; begin < map.keys; begin = end) {
      Listed said{0, valid};
      end = map.keys;
      if (listed) {
        const int64_t block = (j + begin) / p_.functions->block_k;
        end = static_cast<int>(smaller<int64_t>(map.keys, (block + 1) * p_.functions->block_k - j));
        said = listed_in(i, rows, block);
      }
      narrow(j, begin, end, said, map);
    }
    Visibility::narrow(valid, map);
  }

  // q . k of the tile's visible part becomes the score. `raw` and `slope` may be null; they receive
  // q . k and the score's derivative by scale * q . k, 0 where hidden.
  void change(const ScoreTile& t, Real* scores, Real* raw, Real* slope) {
    if (score_.has_code()) return change_by_code(t, scores, raw, slope);
    for_each_strip(t.map, [&](int c, int keys) {
      Real* at = scores + c * kStrideQ;
      score_.run({t.j + c, keys, at, nullptr, visible(t.map, c)});
      if (raw != nullptr) copy(at, kStrideQ, keys, raw + c * kStrideQ);
      copy(score_.result(), score_.width(), keys, at);
      if (slope != nullptr) copy(score_.slope(), score_.width(), keys, slope + c * kStrideQ);
    });
  }

  // The same where registers are no place for a strip's numbers.
  void change_by_code(const ScoreTile& t, Real* scores, Real* raw, Real* slope) {
    for (int s = 0; s < t.map.num_segments; ++s) {
      const int c = t.map.segments[s].begin, keys = t.map.segments[s].end - c;
      const int64_t at = int64_t{c} * kStrideQ;
      if (raw != nullptr) copy(scores + at, kStrideQ, keys, raw + at);
      score_.run_code({t.j + c, keys, scores + at, nullptr, visible(t.map, c)}, scores + at,
                      slope == nullptr ? nullptr : slope + at, nullptr);
    }
  }

  // Adds the tile's part to the gradients of leaves; `ds` is the gradient of the scores.
  void sum_up(const ScoreTile& t, const Real* raw, const Real* ds) {
    for_each_strip(t.map, [&](int c, int keys) {
      const Strip<Real> strip{t.j + c, keys, raw + c * kStrideQ, ds + c * kStrideQ,
                              visible(t.map, c)};
      if (sums_.has_code()) return sums_.run_code(strip, nullptr, nullptr, nullptr);
      sums_.run(strip);
    });
  }

  // Which keys some query sees; null if nothing has to be replaced. See keys_to_keep() of pack.h.
  const uint8_t* keys_to_keep(const Visibility& visibility, Buffer& buffer) {
    const KeyRange range = visibility.keys();
    if (!any_nonfinite<Real>(key_view(p_, p_.k, sequence_, head_, p_.head_dim), range) &&
        !any_nonfinite<Real>(key_view(p_, p_.v, sequence_, head_, p_.head_dim_v), range)) {
      return nullptr;
    }
    uint8_t* keep = buffer.get<uint8_t>(range.end);
    std::memset(keep, 0, static_cast<size_t>(range.end));
    TileMap map;
    for (int64_t i = 0; i < sequence_.seqlen_q; i += kBlockQ) {
      const int rows = static_cast<int>(smaller<int64_t>(sequence_.seqlen_q - i, kBlockQ));
      select_queries(i, rows);
      for (int64_t j = range.begin; j < range.end; j += kBlockK) {
        const int keys = static_cast<int>(smaller<int64_t>(range.end - j, kBlockK));
        visibility.tile(i, rows, j, keys, map);
        if (map.seen != Seen::kNone) hide(i, rows, j, map);
        if (map.seen == Seen::kNone) continue;
        for (int c = 0; c < keys; ++c) {
          keep[j + c] |= map.seen == Seen::kAll || map.visible[c] != 0;
        }
      }
    }
    return keep;
  }

 private:
  // Queries that see all keys of a listed block, and those for which the mask decides.
  struct Listed {
    uint64_t seen, mixed;
  };

  Listed listed_in(int64_t i, int rows, int64_t block) const {
    const PairFunctions& f = *p_.functions;
    Listed said{0, 0};
    for (int q = 0; q < rows;) {
      const int64_t row = (i + q) / f.block_q;
      const int end = static_cast<int>(smaller<int64_t>(rows, (row + 1) * f.block_q - i));
      const uint64_t lanes = Visibility::lanes_below(end) & ~Visibility::lanes_below(q);
      const int32_t kind = *at<const int32_t>(f.kinds, sequence_.batch, head_, row, block);
      if (kind == kBlockSeen) said.seen |= lanes;
      if (kind == kBlockMixed) said.mixed |= lanes;
      q = end;
    }
    return said;
  }

  void narrow(int64_t j, int begin, int end, const Listed& said, TileMap& map) {
    if (!mask_ || said.mixed == 0) {
      for (int c = begin; c < end; ++c) map.visible[c] &= said.seen | said.mixed;
      return;
    }
    for (int c = begin; c < end; c += kStripKeys) {
      const int keys = smaller(end - c, kStripKeys);
      uint64_t open = 0;
      for (int n = 0; n < keys; ++n) open |= map.visible[c + n];
      uint64_t words[kStripKeys] = {};
      if ((open & said.mixed) != 0) find_truths({j + c, keys}, words);
      for (int n = 0; n < keys; ++n) {
        map.visible[c + n] &= said.seen | (said.mixed & words[n]);
      }
    }
  }

  // A word of bits for each key.
  void find_truths(const Strip<Real>& strip, uint64_t* words) {
    if (mask_.has_code()) return mask_.run_code(strip, nullptr, nullptr, words);
    mask_.run(strip);
    for (int n = 0; n < strip.keys; ++n) words[n] = truths(n);
  }

  // One bit a query.
  uint64_t truths(int row) const {
    // Signed and unsigned numbers of one size may stand for each other.
    const auto* from = reinterpret_cast<const uint32_t*>(mask_.truths() + row * mask_.width());
    const VecU one = VecU::set1(1);
    uint64_t word = 0;
    for (int q = 0; q < mask_.width(); q += kLanes) {
      word |= uint64_t{not_below(VecU::load(from + q), one)} << q;
    }
    return word;
  }

  template <class Call>
  static FUSED_ATTN_INLINE void for_each_strip(const TileMap& map, const Call& call) {
    for (int s = 0; s < map.num_segments; ++s) {
      for (int c = map.segments[s].begin; c < map.segments[s].end; c += kStripKeys) {
        call(c, smaller(map.segments[s].end - c, kStripKeys));
      }
    }
  }

  static const uint64_t* visible(const TileMap& map, int c) {
    return map.seen == Seen::kSome ? map.visible + c : nullptr;
  }

  // Rows of a strip, as wide as the registers, to rows of a tile.
  void copy(const Real* from, int stride, int keys, Real* to) const {
    for (int c = 0; c < keys; ++c, from += stride, to += kStrideQ) {
      std::memcpy(to, from, sizeof(Real) * static_cast<size_t>(score_.width()));
    }
  }

  const Params& p_;
  const Sequence sequence_;
  const int64_t head_;
  Interpreter<Real> mask_, score_, sums_;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
