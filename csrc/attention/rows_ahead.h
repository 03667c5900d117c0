// Asks for rows of a tensor before they are needed, a few cache lines at a time between the
// arithmetic. A core waits for memory with its queues full of multiply-adds, which hides little
// latency; a request for a line waits in none of them. The core remembers some twenty requests, so
// they must come at the pace of memory: in bursts they gain nothing.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

class RowsAhead {
 public:
  static constexpr int64_t kLine = 64;  // bytes

  // Rows of `columns` elements, `stride` elements apart.
  template <class T>
  void start(const T* first, int64_t stride, int64_t columns, int64_t rows) {
    row_ = reinterpret_cast<const char*>(first);
    stride_ = stride * static_cast<int64_t>(sizeof(T));
    bytes_ = columns * static_cast<int64_t>(sizeof(T));
    column_ = 0;
    rows_ = rows;
  }

  // The next `lines` lines, if there are any.
  FUSED_ATTN_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      prefetch(row_ + column_);
      column_ += kLine;
      if (column_ >= bytes_) {
        column_ = 0;
        row_ += stride_;
        --rows_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0;
  int64_t bytes_ = 0;   // of a row
  int64_t column_ = 0;  // byte of the row that comes next
  int64_t rows_ = 0;    // left
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
