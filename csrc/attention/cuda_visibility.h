// Which keys the queries of a block can see, and which of its key tiles need masks.
#pragma once

#include "attention/cuda_problem.h"

namespace fused_attn::attention {

using device::larger;
using device::SharedAddress;
using device::smaller;

// Query i sees the keys [first(i), end(i)), apart from those that padding and bool masks hide.
class Band {
 public:
  FUSED_ATTN_DEVICE Band(const DeviceProblem& p, const Sequence& sequence) {
    const int shift = p.aligned_right ? sequence.seqlen_k - sequence.seqlen_q : 0;
    low_ = p.low + shift;
    high_ = p.high + shift + 1;
    key_end_ = sequence.seqlen_k;
    if (p.key_lengths != nullptr) {
      const int64_t length = p.key_lengths[sequence.batch];
      if (length < key_end_) key_end_ = larger(static_cast<int>(length), 0);
    }
    // Nobody sees past the last query's end or before the first one's beginning: what is stored
    // there must not matter, even if it is NaN.
    key_end_ = larger(smaller(key_end_, sequence.seqlen_q - 1 + high_), 0);
    key_begin_ = larger(low_, 0);
  }

  FUSED_ATTN_DEVICE int first(int query) const { return larger(query + low_, 0); }
  FUSED_ATTN_DEVICE int end(int query) const { return smaller(query + high_, key_end_); }
  FUSED_ATTN_DEVICE int key_begin() const { return key_begin_; }
  FUSED_ATTN_DEVICE int key_end() const { return key_end_; }

 private:
  int low_, high_, key_begin_, key_end_;
};

// The key tiles of `kBlockN` keys for a block of queries: [begin, end) hold a visible key,
// [plain_begin, plain_end) are visible as a whole to all queries.
template <int kBlockN>
struct KeyTiles {
  int begin, end, plain_begin, plain_end;

  FUSED_ATTN_DEVICE KeyTiles(const Band& band, int query_begin, int query_end) {
    const int last = query_end - 1;
    const int first_key = band.first(query_begin), end_key = band.end(last);
    begin = first_key / kBlockN;
    end = end_key > first_key && query_end > query_begin ? (end_key + kBlockN - 1) / kBlockN : begin;
    plain_begin = (band.first(last) + kBlockN - 1) / kBlockN;
    plain_end = larger(band.end(query_begin), 0) / kBlockN;
  }

  FUSED_ATTN_DEVICE bool plain(int tile) const { return tile >= plain_begin && tile < plain_end; }
};

}  // namespace fused_attn::attention
