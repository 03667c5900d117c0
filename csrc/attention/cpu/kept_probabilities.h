// The probabilities of a block of queries, kept while the running softmax goes over the keys, for
// those who want more of them than the product with V.
#pragma once

#include "attention/cpu/softmax.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

template <class E>
class KeptProbabilities {
  using Real = typename E::Real;
  using Unit = typename E::Unit;
  using V = Vec<Real>;

 public:
  // Before a block that sees at most these keys.
  void reset(KeyRange keys) {
    values_ = value_buffer_.get<Unit>((units<E>(keys.end) + 1) * kStrideQ);
    tiles_ = tile_buffer_.template get<KeptTile>(ceil_div(keys.end, kBlockK) + 1);
    count_ = 0;
  }

  // Where the probabilities of the tile of keys from j on go, [key unit][query].
  Unit* tile(int64_t j) { return values_ + j / E::kPair * kStrideQ; }

  // They are there, relative to `shift`.
  void keep(int64_t j, const TileMap& map, const Shift<Real>& shift) {
    KeptTile& tile = tiles_[count_++];
    tile.j = j;
    tile.num_segments = map.num_segments;
    std::memcpy(tile.segments, map.segments, sizeof tile.segments);
    tile.shift = shift;
  }

  // sums[key][query] += factor times the probabilities relative to the last shift.
  void add_to(Real* sums, const Shift<Real>& last, const ScoreFormula<Real>& formula,
              const Real* factor) const {
    alignas(64) Real scale[kBlockQ];
    const V to_exponent = V::set1(formula.log2_scale());
    for (int64_t t = 0; t < count_; ++t) {
      const KeptTile& tile = tiles_[t];
      for (int q = 0; q < kBlockQ; q += kLanes) {
        const V correction = formula.plain
                                 ? correction_between<true>(tile.shift, last, q, to_exponent)
                                 : correction_between<false>(tile.shift, last, q, to_exponent);
        (correction * V::load(factor + q)).store(scale + q);
      }
      for (int s = 0; s < tile.num_segments; ++s) add_segment(tile, tile.segments[s], scale, sums);
    }
  }

 private:
  struct KeptTile {
    Shift<Real> shift;
    int64_t j;
    int num_segments;
    Segment segments[kBlockK / kSegment];
  };

  void add_segment(const KeptTile& tile, const Segment& segment, const Real* scale,
                   Real* sums) const {
    const Unit* from = values_ + tile.j / E::kPair * kStrideQ;
    sums += tile.j * kStrideQ;
    for (int g = segment.group_begin; g < segment.group_end; ++g) {
      const int lane = g * kLanes;
      const V factor = V::load(scale + lane);
      const auto add = [&](int c, V p) {
        Real* sum = sums + c * kStrideQ + lane;
        fma(p, factor, V::load(sum)).store(sum);
      };
      if constexpr (E::kPair == 1) {
        for (int c = segment.begin; c < segment.end; ++c)
          add(c, V::load(from + c * kStrideQ + lane));
      } else {
        for (int c = segment.begin; c < segment.end; c += 2) {
          const auto pair = Vec<Unit>::load(from + c / 2 * kStrideQ + lane);
          add(c, even_of_pairs(pair));
          if (c + 1 < segment.end) add(c + 1, odd_of_pairs(pair));
        }
      }
    }
  }

  Buffer value_buffer_, tile_buffer_;
  Unit* values_ = nullptr;
  KeptTile* tiles_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
