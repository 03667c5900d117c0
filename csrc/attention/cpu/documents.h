// Which queries and keys of a tile are of one document: an id each, int32 or int64.
#pragma once

#include "attention/cpu/sequence.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// The ids of one sequence's queries or keys.
class DocumentIds {
 public:
  DocumentIds() = default;
  DocumentIds(const View4& view, int64_t batch, int64_t first)
      : data_(view.data),
        wide_(view.dtype == DType::kInt64),
        first_(batch * view.stride[0] + first * view.stride[1]),
        stride_(view.stride[1]) {}

  explicit operator bool() const { return data_ != nullptr; }

  int64_t operator[](int64_t row) const {
    const int64_t at = first_ + row * stride_;
    return wide_ ? static_cast<const int64_t*>(data_)[at] : static_cast<const int32_t*>(data_)[at];
  }

  // to[n] = the id of row `row` + n, n < count.
  void load(int64_t row, int count, int64_t* to) const {
    if (wide_) {
      copy(static_cast<const int64_t*>(data_) + first_ + row * stride_, count, to);
    } else {
      copy(static_cast<const int32_t*>(data_) + first_ + row * stride_, count, to);
    }
  }

 private:
  template <class T>
  void copy(const T* from, int count, int64_t* to) const {
    if (stride_ == 1) {
      for (int n = 0; n < count; ++n) to[n] = from[n];
    } else {
      for (int n = 0; n < count; ++n) to[n] = from[n * stride_];
    }
  }

  const void* data_ = nullptr;
  bool wide_ = false;
  int64_t first_ = 0;
  int64_t stride_ = 0;
};

// The ids of a tile. Documents mostly come in runs: then a few comparisons tell of a whole tile.
class DocumentTile {
 public:
  enum class Meets { kNever, kAlways, kSometimes };

  DocumentTile(const DocumentIds& of_queries, int64_t i, int rows, const DocumentIds& of_keys,
               int64_t j, int columns)
      : rows_(rows), columns_(columns) {
    of_queries.load(i, rows, queries_);
    of_keys.load(j, columns, keys_);
  }

  Meets meets() const {
    const Span of_queries = span(queries_, rows_), of_keys = span(keys_, columns_);
    if (of_queries.last < of_keys.first || of_keys.last < of_queries.first) return Meets::kNever;
    const bool one = of_queries.first == of_queries.last && of_keys.first == of_keys.last;
    return one ? Meets::kAlways : Meets::kSometimes;
  }

  // Clears in visible[key] the queries of other documents.
  void hide(uint64_t* visible) const {
    uint64_t same = 0;
    for (int c = 0; c < columns_; ++c) {
      if (c == 0 || keys_[c] != keys_[c - 1]) {
        same = 0;
        for (int r = 0; r < rows_; ++r) same |= uint64_t{queries_[r] == keys_[c]} << r;
      }
      visible[c] &= same;
    }
  }

 private:
  struct Span {
    int64_t first;
    int64_t last;
  };
  static Span span(const int64_t* ids, int count) {
    Span found{ids[0], ids[0]};
    for (int n = 1; n < count; ++n) {
      found.first = smaller(found.first, ids[n]);
      found.last = larger(found.last, ids[n]);
    }
    return found;
  }

  const int rows_;
  const int columns_;
  int64_t queries_[kBlockQ];
  int64_t keys_[kBlockK];
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
