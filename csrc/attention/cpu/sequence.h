// Where the rows of one sequence of a batch are, and access to its operands.
#pragma once

#include "attention/cpu/engine.h"

namespace fused_attn::attention::FUSED_ATTN_LEVEL {

// One batch element, or one sequence of a packed batch.
struct Sequence {
  int64_t batch;  // index into key_lengths, key_padding_mask and the dropout counter
  int64_t seqlen_q;
  int64_t seqlen_k;
  int64_t first_q;  // its first row in q, out, lse
  int64_t first_k;  // its first row in k, v

  Sequence(const Params& p, int64_t b)
      : batch(b), seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k), first_q(0), first_k(0) {
    if (p.cu_seqlens_q != nullptr) {
      first_q = p.cu_seqlens_q[b];
      seqlen_q = p.cu_seqlens_q[b + 1] - first_q;
    }
    if (p.cu_seqlens_k != nullptr) {
      first_k = p.cu_seqlens_k[b];
      seqlen_k = p.cu_seqlens_k[b + 1] - first_k;
    }
  }
};

// A view with its dtype as a type.
template <class T>
FUSED_ATTN_INLINE T* at(const View4& view, int64_t b, int64_t h, int64_t row, int64_t column = 0) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
         row * view.stride[2] + column * view.stride[3];
}

// Calls `call` with a null pointer to the type of the elements of q, k, v, out or their gradients,
// in a problem that is computed in Real.
template <class Real, class Call>
FUSED_ATTN_INLINE void with_dtype(DType dtype, const Call& call) {
  if constexpr (sizeof(Real) == 8) {
    call(static_cast<double*>(nullptr));
  } else {
    if constexpr (has_kernels(DType::kFloat32)) {
      if (dtype == DType::kFloat32) return call(static_cast<float*>(nullptr));
    }
    if constexpr (has_kernels(DType::kFloat16)) {
      if (dtype == DType::kFloat16) return call(static_cast<Float16*>(nullptr));
    }
    if (dtype == DType::kBFloat16) call(static_cast<BFloat16*>(nullptr));
  }
}

// The same for the elements of the bias: float32, or the dtype of q.
template <class Real, class Call>
FUSED_ATTN_INLINE void with_bias_dtype(DType dtype, const Call& call) {
  if (dtype == DType::kFloat32) return call(static_cast<float*>(nullptr));
  with_dtype<Real>(dtype, call);
}

// One number of any floating type.
template <class Real, class T>
FUSED_ATTN_INLINE Real to_real(T x) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<Real>(x);
  } else {
    return static_cast<Real>(to_float(x));
  }
}
template <class T, class Real>
FUSED_ATTN_INLINE void from_real(Real x, T* to) {
  if constexpr (sizeof(T) == 8) {
    *to = static_cast<double>(x);
  } else {
    from_float(static_cast<float>(x), to);
  }
}

// Loads and stores of n <= 16 numbers of any floating type as Vec<Real>.
template <class Real, class T>
FUSED_ATTN_INLINE Vec<Real> load_as(const T* from, int n) {
  if constexpr ((sizeof(T) == 8) == (sizeof(Real) == 8)) {
    return n == kLanes ? load(from) : load(from, n);
  } else {
    alignas(64) Real lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_real<Real>(from[i]);
    return Vec<Real>::load(lanes);
  }
}
template <class Real, class T>
FUSED_ATTN_INLINE void store_as(T* to, Vec<Real> v, int n) {
  if constexpr ((sizeof(T) == 8) == (sizeof(Real) == 8)) {
    if (n == kLanes) {
      store(to, v);
    } else {
      store(to, v, n);
    }
  } else {
    alignas(64) Real lanes[kLanes];
    v.store(lanes);
    for (int i = 0; i < n; ++i) from_real(lanes[i], to + i);
  }
}

}  // namespace fused_attn::attention::FUSED_ATTN_LEVEL
