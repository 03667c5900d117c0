// Which keys a query may see: causal, window, prefix, chunk, documents, key lengths, padding mask
// and bool mask in one place.
#pragma once

#include "attention/cpu/documents.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

struct KeyRange {
  int64_t begin;
  int64_t end;
};

// Consecutive keys of a tile, and the groups of 16 queries that see any of them.
struct Segment {
  int begin;
  int end;
  int group_begin;
  int group_end;
};

enum class Seen { kNone, kAll, kSome };

// The visible part of a tile of up to kBlockQ queries x kBlockK keys.
struct TileMap {
  Seen seen;
  int keys;
  int num_segments;
  Segment segments[kBlockK / kSegment];
  uint64_t visible[kBlockK];  // bit = query; filled in only if seen == kSome

  FUSED_ATTN_INLINE const uint64_t* mask() const { return seen == Seen::kSome ? visible : nullptr; }
  // Is all of the tile one segment with these groups?
  FUSED_ATTN_INLINE bool whole(int groups) const {
    return num_segments == 1 && segments[0].begin == 0 && segments[0].end == keys &&
           segments[0].group_begin == 0 && segments[0].group_end == groups;
  }
};

// Transposes a 64 x 64 matrix of bits by exchanging ever smaller blocks (Warren, Hacker's Delight,
// 7-3).
inline void transpose_bits(uint64_t (&rows)[64]) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int width = 32; width != 0; width >>= 1, mask ^= mask << width) {
    for (int base = 0; base < 64; base += 2 * width) {
      for (int i = base; i < base + width; ++i) {
        const uint64_t t = ((rows[i] >> width) ^ rows[i + width]) & mask;
        rows[i] ^= t << width;
        rows[i + width] ^= t;
      }
    }
  }
}

class Visibility {
 public:
  Visibility(const Params& p, const Sequence& sequence, int64_t head)
      : left_(p.window_left >= 0 ? p.window_left : kUnbounded),
        right_(p.window_right >= 0 ? p.window_right : kUnbounded),
        shift_(p.causal == Causal::kUpperLeft ? 0 : sequence.seqlen_k - sequence.seqlen_q),
        keys_{0, sequence.seqlen_k} {
    if (p.causal != Causal::kNone) right_ = smaller<int64_t>(right_, 0);
    if (p.chunk > 0) chunk_ = smaller(p.chunk, kUnbounded);
    if (p.prefix_lengths != nullptr) {
      prefix_ = larger<int64_t>(0, smaller(keys_.end, p.prefix_lengths[sequence.batch]));
    }
    if (p.query_documents.data != nullptr) {
      of_queries_ = DocumentIds(p.query_documents, sequence.batch, sequence.first_q);
      of_keys_ = DocumentIds(p.key_documents, sequence.batch, sequence.first_k);
    }
    if (p.key_lengths != nullptr) {
      keys_.end = larger<int64_t>(0, smaller(keys_.end, p.key_lengths[sequence.batch]));
    }
    if (p.key_padding_mask != nullptr) {
      padding_ = p.key_padding_mask + sequence.batch * p.key_padding_stride[0];
      stride_padding_ = p.key_padding_stride[1];
      trim_padding();
    }
    if (p.mask.data != nullptr) {
      mask_ = at<const uint8_t>(p.mask, sequence.batch, head, 0);
      stride_mask_[0] = p.mask.stride[2];
      stride_mask_[1] = p.mask.stride[3];
    }
    // No query sees a key outside the band of all queries.
    keys_ = keys(0, sequence.seqlen_q);
  }

  // The keys that may be visible to some of the queries [begin, end); exact but for `has_holes`.
  KeyRange keys(int64_t begin, int64_t end) const {
    KeyRange range{begin + shift_ - left_, end + shift_ + right_};
    if (prefix_ > 0) range = {0, larger(range.end, prefix_)};
    if (chunk_ > 0) {
      range.begin = larger(range.begin, chunk_of(begin + shift_) * chunk_);
      range.end = smaller(range.end, (chunk_of(end - 1 + shift_) + 1) * chunk_);
    }
    range = {larger(keys_.begin, range.begin), smaller(keys_.end, range.end)};
    if (begin >= end || range.end < range.begin) range.end = range.begin = keys_.begin;
    return range;
  }
  KeyRange keys() const { return keys_; }

  // May a key inside keys() be hidden from all queries?
  bool has_holes() const { return holes_ || mask_ != nullptr || of_queries_ || prefix_ > 0; }

  bool visible(int64_t i, int64_t j) const {
    const int64_t d = i + shift_ - j;
    return j >= keys_.begin && j < keys_.end && (j < prefix_ || (d <= left_ && -d <= right_)) &&
           (chunk_ == 0 || chunk_of(i + shift_) == chunk_of(j)) &&
           (!of_queries_ || of_queries_[i] == of_keys_[j]) &&
           (!holes_ || padding_[j * stride_padding_] != 0) &&
           (mask_ == nullptr || mask_[i * stride_mask_[0] + j * stride_mask_[1]] != 0);
  }

  // Describes a tile of whose pairs map.visible has been narrowed, of queries `valid`.
  static void narrow(uint64_t valid, TileMap& map) {
    map.seen = Seen::kAll;
    map.num_segments = 1;
    int groups = 1;
    while (groups < kGroups && (valid >> (groups * kLanes)) != 0) ++groups;
    map.segments[0] = {0, map.keys, 0, groups};
    classify(valid, map);
  }

  static uint64_t lanes_below(int rows) {
    return rows >= 64 ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
  }

  // Describes the tile of queries [i, i + rows) and keys [j, j + columns), which must not reach
  // beyond the end of keys().
  void tile(int64_t i, int rows, int64_t j, int columns, TileMap& map) const {
    map.keys = columns;
    map.num_segments = 1;
    map.segments[0] = {0, columns, 0, static_cast<int>(ceil_div(rows, kLanes))};
    map.seen = Seen::kAll;
    const bool in_band =
        (i + shift_ - (j + columns - 1) >= -right_ && i + rows - 1 + shift_ - j <= left_) ||
        j + columns <= prefix_;
    const bool inside = j >= keys_.begin && in_band && in_one_chunk(i, rows, j, columns) &&
                        !holes_ && mask_ == nullptr;
    if (!of_queries_) {
      if (!inside) hide(i, rows, j, columns, nullptr, map);
      return;
    }
    const DocumentTile documents(of_queries_, i, rows, of_keys_, j, columns);
    switch (documents.meets()) {
      case DocumentTile::Meets::kNever:
        map.seen = Seen::kNone;
        map.num_segments = 0;
        return;
      case DocumentTile::Meets::kAlways:
        if (!inside) hide(i, rows, j, columns, nullptr, map);
        return;
      case DocumentTile::Meets::kSometimes:
        hide(i, rows, j, columns, &documents, map);
    }
  }

 private:
  static constexpr int64_t kUnbounded = int64_t{1} << 60;

  // Fills in the map of a tile of which something may be hidden.
  void hide(int64_t i, int rows, int64_t j, int columns, const DocumentTile* documents,
            TileMap& map) const {
    const uint64_t valid = lanes_below(rows);
    fill_band(i, j, columns, valid, map.visible);
    if (chunk_ > 0) hide_chunks(i, j, columns, map.visible);
    if (documents != nullptr) documents->hide(map.visible);
    if (holes_) hide_padding(j, columns, map.visible);
    if (mask_ != nullptr) apply_mask(i, rows, j, columns, map.visible);
    classify(valid, map);
  }

  // floor(position / chunk); positions of queries may be below 0.
  int64_t chunk_of(int64_t position) const {
    return position >= 0 ? position / chunk_ : -ceil_div(-position, chunk_);
  }

  bool in_one_chunk(int64_t i, int rows, int64_t j, int columns) const {
    if (chunk_ == 0) return true;
    const int64_t chunk = chunk_of(j);
    return chunk_of(j + columns - 1) == chunk && chunk_of(i + shift_) == chunk &&
           chunk_of(i + rows - 1 + shift_) == chunk;
  }

  static FUSED_ATTN_INLINE uint64_t bits_from(int64_t lane) {
    return lane <= 0 ? ~uint64_t{0} : lane >= 64 ? 0 : ~uint64_t{0} << lane;
  }

  void trim_padding() {
    auto hidden = [&](int64_t j) { return padding_[j * stride_padding_] == 0; };
    while (keys_.begin < keys_.end && hidden(keys_.end - 1)) --keys_.end;
    while (keys_.begin < keys_.end && hidden(keys_.begin)) ++keys_.begin;
    for (int64_t j = keys_.begin; j < keys_.end && !holes_; ++j) holes_ = hidden(j);
  }

  void fill_band(int64_t i, int64_t j, int columns, uint64_t valid, uint64_t* visible) const {
    for (int c = 0; c < columns; ++c) {
      const int64_t diagonal = j + c - shift_ - i;  // the lane with d = 0
      visible[c] = valid & bits_from(diagonal - right_) & ~bits_from(diagonal + left_ + 1);
      if (j + c < prefix_) visible[c] = valid;
      if (j + c < keys_.begin) visible[c] = 0;
    }
  }

  void hide_chunks(int64_t i, int64_t j, int columns, uint64_t* visible) const {
    for (int c = 0; c < columns; ++c) {
      const int64_t lane = chunk_of(j + c) * chunk_ - shift_ - i;  // of the chunk's first query
      visible[c] &= bits_from(lane) & ~bits_from(lane + chunk_);
    }
  }

  void hide_padding(int64_t j, int columns, uint64_t* visible) const {
    for (int c = 0; c < columns; ++c) {
      if (padding_[(j + c) * stride_padding_] == 0) visible[c] = 0;
    }
  }

  void apply_mask(int64_t i, int rows, int64_t j, int columns, uint64_t* visible) const {
    const uint8_t* corner = mask_ + i * stride_mask_[0] + j * stride_mask_[1];
    if (stride_mask_[0] == 0) {
      for (int c = 0; c < columns; ++c) {
        if (corner[c * stride_mask_[1]] == 0) visible[c] = 0;
      }
      return;
    }
    for (int c0 = 0; c0 < columns; c0 += 64) {
      const int count = smaller(columns - c0, 64);
      uint64_t bits[64] = {};  // of keys, by query; then of queries, by key
      for (int r = 0; r < rows; ++r) {
        const uint8_t* row = corner + r * stride_mask_[0] + c0 * stride_mask_[1];
        if (stride_mask_[1] == 1) {
          bits[r] = nonzero_bytes(row, count);
        } else {
          for (int c = 0; c < count; ++c) {
            bits[r] |= uint64_t{row[c * stride_mask_[1]] != 0} << c;
          }
        }
      }
      transpose_bits(bits);
      for (int c = 0; c < count; ++c) visible[c0 + c] &= bits[c];
    }
  }

  static void classify(uint64_t valid, TileMap& map) {
    uint64_t common = valid, any = 0;
    for (int c = 0; c < map.keys; ++c) {
      common &= map.visible[c];
      any |= map.visible[c];
    }
    if (common == valid) return;
    map.seen = any == 0 ? Seen::kNone : Seen::kSome;
    map.num_segments = 0;
    for (int begin = 0; begin < map.keys; begin += kSegment) {
      const int end = smaller(begin + kSegment, map.keys);
      uint64_t seen = 0;
      for (int c = begin; c < end; ++c) seen |= map.visible[c];
      if (seen == 0) continue;
      Segment segment{begin, end, 0, kGroups};
      while ((seen >> (segment.group_begin * kLanes) & 0xffff) == 0) ++segment.group_begin;
      while ((seen >> ((segment.group_end - 1) * kLanes) & 0xffff) == 0) --segment.group_end;
      append(segment, map);
    }
  }

  static void append(const Segment& segment, TileMap& map) {
    if (map.num_segments > 0) {
      Segment& last = map.segments[map.num_segments - 1];
      if (last.end == segment.begin && last.group_begin == segment.group_begin &&
          last.group_end == segment.group_end) {
        last.end = segment.end;
        return;
      }
    }
    map.segments[map.num_segments++] = segment;
  }

  int64_t left_;
  int64_t right_;
  int64_t shift_;
  int64_t chunk_ = 0;   // 0: none
  int64_t prefix_ = 0;  // keys before it are exempt from the band
  DocumentIds of_queries_;
  DocumentIds of_keys_;
  KeyRange keys_;
  const uint8_t* padding_ = nullptr;
  int64_t stride_padding_ = 0;
  bool holes_ = false;
  const uint8_t* mask_ = nullptr;
  int64_t stride_mask_[2] = {0, 0};
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
