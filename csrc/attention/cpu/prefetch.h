// Prefetches rows of a tensor before they are needed, a few cache lines at a time between the
// arithmetic. A core waits for memory with its queues full of multiply-adds, which hides little
// latency; a request for a line waits in none of them. The core remembers some twenty requests, so
// they must come at the pace of memory: in bursts they gain nothing.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// Rows of `bytes`, `stride` bytes apart.
struct ByteRows {
  static constexpr int64_t kLine = 64;  // bytes

  const char* first = nullptr;
  int64_t stride = 0;
  int64_t bytes = 0;
  int64_t count = 0;

  // Rows [begin, end), as far as they are there.
  ByteRows part(int64_t begin, int64_t end) const {
    const int64_t stop = end < count ? end : count;
    return {first + begin * stride, stride, bytes, begin < stop ? stop - begin : 0};
  }
  int64_t lines() const { return count * ((bytes + kLine - 1) / kLine); }
};

template <class T>
FUSED_ATTN_INLINE ByteRows byte_rows(const T* first, int64_t stride, int64_t columns,
                                     int64_t count) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  return {reinterpret_cast<const char*>(first), stride * kSize, columns * kSize, count};
}

// Brings rows to cache kCache.
template <int kCache>
class RowPrefetcher {
 public:
  void start(const ByteRows& rows) {
    row_ = rows.first;
    stride_ = rows.stride;
    bytes_ = rows.bytes;
    column_ = 0;
    rows_ = rows.count;
  }

  // The next `lines` lines, if there are any.
  FUSED_ATTN_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      prefetch<kCache>(row_ + column_);
      column_ += ByteRows::kLine;
      if (column_ >= bytes_) {
        column_ = 0;
        row_ += stride_;
        --rows_;
      }
    }
  }

  bool done() const { return rows_ <= 0; }
  int64_t lines_left() const { return ByteRows{row_, stride_, bytes_, rows_}.lines(); }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0;
  int64_t bytes_ = 0;   // of a row
  int64_t column_ = 0;  // byte of the row that comes next
  int64_t rows_ = 0;    // left
};

// What a head prefetches while it computes: first what its present and next block of queries need,
// then a part of what the next head needs.
class HeadPrefetcher {
 public:
  static constexpr int kSets = 4;

  // For a head of so many blocks.
  void start_head(const ByteRows (&next)[kSets], int64_t blocks) {
    for (int n = 0; n < kSets; ++n) sets_[2 + n].start(next[n]);
    blocks_ = blocks;
  }
  // A block during which step() will be called `calls` times.
  void start_block(const ByteRows& first, const ByteRows& second, int64_t calls) {
    sets_[0].start(first);
    sets_[1].start(second);
    at_ = 0;
    int64_t lines = 0;
    if (blocks_ > 0) {
      for (int n = 2; n < 2 + kSets; ++n) lines += sets_[n].lines_left();
      lines /= blocks_--;
    }
    lines += first.lines() + second.lines();
    lines_ = calls == 0 ? 0 : (lines + calls - 1) / calls;
  }
  // What this tile needs right after a product during which step() will be called `calls` times.
  void start_tile(const ByteRows& rows, int64_t calls) {
    tile_.start(rows);
    tile_lines_ = calls == 0 ? 0 : (rows.lines() + calls - 1) / calls;
  }
  FUSED_ATTN_INLINE void step() {
    if ((lines_ | tile_lines_) != 0) fetch();
  }

 private:
  FUSED_ATTN_NOINLINE void fetch() {
    if (tile_lines_ != 0) {
      tile_.fetch(tile_lines_);
      if (tile_.done()) tile_lines_ = 0;
    }
    if (lines_ == 0) return;
    sets_[at_].fetch(lines_);
    while (sets_[at_].done()) {
      if (++at_ < 2 + kSets) continue;
      lines_ = 0;
      at_ = 0;
      return;
    }
  }

  RowPrefetcher<2> tile_;
  int64_t tile_lines_ = 0;  // at a time; 0 when there are no more
  RowPrefetcher<2> sets_[2 + kSets];
  int at_ = 0;
  int64_t lines_ = 0;   // at a time; 0 when there are no more
  int64_t blocks_ = 0;  // left
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
