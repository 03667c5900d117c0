// The rows of K or V that belong to one tile of keys, with their columns side by side.
#pragma once

#include "attention/cpu/pack.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

template <class T>
class TileRows {
 public:
  TileRows(const HeadView& view, Buffer& buffer)
      : view_(view), in_place_(view.stride_column() == 1 || view.columns == 1) {
    if (!in_place_) copy_ = buffer.get<T>(kBlockK * view.columns);
  }

  // Selects the keys [j, j + keys).
  void select(int64_t j, int keys) {
    first_ = in_place_ ? view_.template row<const T>(j) : copy_;
    if (in_place_) return;
    for (int c = 0; c < keys; ++c) {
      const T* from = view_.template row<const T>(j + c);
      for (int64_t d = 0; d < view_.columns; ++d) {
        copy_[c * view_.columns + d] = from[d * view_.stride_column()];
      }
    }
  }

  const T* first() const { return first_; }
  int64_t stride() const { return in_place_ ? view_.stride_row() : view_.columns; }
  bool in_place() const { return in_place_; }

 private:
  const HeadView view_;
  const bool in_place_;
  T* copy_ = nullptr;
  const T* first_ = nullptr;
};

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
