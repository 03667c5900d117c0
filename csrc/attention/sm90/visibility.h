// Which keys the queries of a block can see, and which of its key tiles need masks.
#pragma once

#include "attention/sm90/problem.h"

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
    seqlen_q_ = sequence.seqlen_q;
  }

  FUSED_ATTN_DEVICE int first(int query) const { return larger(query + low_, 0); }
  FUSED_ATTN_DEVICE int end(int query) const { return smaller(query + high_, key_end_); }
  // The other way round: the queries [first_query(j), end_query(j)) see key j.
  FUSED_ATTN_DEVICE int first_query(int key) const { return larger(lowest_query(key), 0); }
  FUSED_ATTN_DEVICE int lowest_query(int key) const { return key - high_ + 1; }  // maybe below 0
  FUSED_ATTN_DEVICE int end_query(int key) const {
    return key < key_end_ ? smaller(key - low_ + 1, seqlen_q_) : 0;
  }

  FUSED_ATTN_DEVICE int key_begin() const { return key_begin_; }
  FUSED_ATTN_DEVICE int key_end() const { return key_end_; }
  FUSED_ATTN_DEVICE int seqlen_q() const { return seqlen_q_; }

 private:
  int low_, high_, key_begin_, key_end_, seqlen_q_;
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
    end =
        end_key > first_key && query_end > query_begin ? (end_key + kBlockN - 1) / kBlockN : begin;
    plain_begin = (band.first(last) + kBlockN - 1) / kBlockN;
    plain_end = larger(band.end(query_begin), 0) / kBlockN;
  }

  FUSED_ATTN_DEVICE bool plain(int tile) const { return tile >= plain_begin && tile < plain_end; }
};

// The query tiles of `kBlockM` queries for a block of keys, likewise.
template <int kBlockM>
struct QueryTiles {
  int begin, end, plain_begin, plain_end;

  // `key_end` may lie past the last key, whose rows then need a mask.
  FUSED_ATTN_DEVICE QueryTiles(const Band& band, int key_begin, int key_end) {
    const int last = smaller(key_end, band.key_end()) - 1;
    const int first_query = band.first_query(key_begin), end_query = band.end_query(last);
    begin = first_query / kBlockM;
    end =
        last >= key_begin && end_query > first_query ? (end_query + kBlockM - 1) / kBlockM : begin;
    // Queries past the end need no mask: their probabilities are 0.
    plain_begin = (band.first_query(key_end - 1) + kBlockM - 1) / kBlockM;
    const int plain_until = band.end_query(key_begin);
    plain_end = key_end > band.key_end()         ? 0
                : plain_until == band.seqlen_q() ? end
                                                 : plain_until / kBlockM;
  }

  FUSED_ATTN_DEVICE bool plain(int tile) const { return tile >= plain_begin && tile < plain_end; }
};

}  // namespace fused_attn::attention
