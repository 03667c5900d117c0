// Chooses norm kernels and launches them.
#include <algorithm>

#include "cuda/launch.h"
#include "layer_norm/cuda/backward.h"
#include "layer_norm/cuda/forward.h"
#include "layer_norm/cuda/launch.h"

namespace fused_attn::layer_norm {
namespace {

using device::LaunchShape;
using device::Stream;

DeviceNorm device_norm(const Problem& p) {
  DeviceNorm d = {};
  d.rows = p.rows;
  d.width = static_cast<int>(p.width);
  d.x = p.x.data;
  d.residual = p.residual.data;
  d.weight = p.weight.data;
  d.bias = p.bias.data;
  const DType parameters = d.weight != nullptr ? p.weight.dtype : p.bias.dtype;
  d.wide_parameters = parameters == DType::kFloat32;
  d.rng = p.dropout_p > 0 ? p.rng : nullptr;
  d.keep_scale = p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f;
  d.keep_from = p.dropout_p < 1 ? static_cast<uint32_t>(p.dropout_p * 0x1p32) : ~0u;
  d.rms = p.rms;
  return d;
}

bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;  // also null: absent
}

template <class Shape>
void launch_forward(const DeviceNorm& d, Stream stream) {
  constexpr int kRows = kRowsPerBlock<Shape::kThreads>;
  const LaunchShape shape{"layer_norm_forward", (d.rows + kRows - 1) / kRows,
                          kBlockThreads<Shape::kThreads>, kScratchBytes, 0};
  device::launch(&norm_forward_kernel<Shape>, shape, stream, d);
}

template <class Shape>
void launch_backward(const DeviceNormBackward& d, int64_t blocks, Stream stream) {
  const bool sums = kRowsPerBlock<Shape::kThreads> > 1;
  const uint32_t shared = kScratchBytes + (sums ? 4 * static_cast<uint32_t>(d.width) : 0);
  const LaunchShape shape{"layer_norm_backward", blocks, kBlockThreads<Shape::kThreads>, shared, 0};
  device::launch(&norm_backward_kernel<Shape>, shape, stream, d);
}

// Calls call(shape) with the way to hold rows of `width` elements: a warp, a block, or not at all.
template <class T, bool kBackward, class Call>
void with_shape(int64_t width, bool vectors, const Call& call) {
  constexpr int kWidth = 16 / sizeof(typename T::Bits);
  if (!vectors || width % kWidth != 0) {
    if (width <= 128) return call(RowShape<T, 1, 32, 4>());
    return call(RowShape<T, 1, 256, 0>());
  }
  if (width <= 32 * 4 * kWidth) return call(RowShape<T, kWidth, 32, 4>());
  if (width <= 256 * 4 * kWidth) return call(RowShape<T, kWidth, 256, 4>());
  if constexpr (!kBackward) {
    if (width <= 1024 * 2 * kWidth) return call(RowShape<T, kWidth, 1024, 2>());
  }
  return call(RowShape<T, kWidth, 1024, 0>());
}

// Calls call(type) with the type of a problem's elements.
template <class Call>
void with_type(DType dtype, const Call& call) {
  if (dtype == DType::kFloat32) return call(Float32());
  if (dtype == DType::kBFloat16) return call(BFloat16());
  return call(Float16());
}

void add_up(const float* parts, int64_t count, const Rows& to, int64_t width, Stream stream) {
  if (to.data == nullptr || width == 0) return;
  const LaunchShape shape{"layer_norm_backward (parameters)",
                          (width + kSumColumns - 1) / kSumColumns, kSumThreads, 4 * kSumThreads, 0};
  with_type(to.dtype, [&](auto type) {
    device::launch(&norm_column_sum_kernel<decltype(type)>, shape, stream, parts,
                   static_cast<int>(count), static_cast<int>(width), to.data);
  });
}

}  // namespace

void forward_cuda(const Params& p, void* stream) {
  if (p.rows == 0) return;
  DeviceNorm d = device_norm(p);
  d.eps = static_cast<float>(p.eps);
  d.y = p.y.data;
  d.h = p.h.data;
  d.mean = static_cast<float*>(p.mean);
  d.rstd = static_cast<float*>(p.rstd);
  const bool vectors = aligned(d.x) && aligned(d.residual) && aligned(d.weight) &&
                       aligned(d.bias) && aligned(d.y) && aligned(d.h);
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type), false>(
        p.width, vectors, [&](auto shape) { launch_forward<decltype(shape)>(d, stream); });
  });
}

int64_t backward_parts(const Problem& p) {
  // Two blocks a multiprocessor, and no more than there are rows for.
  const int64_t wanted = 2 * device::multiprocessors();
  return std::max<int64_t>(1, std::min(wanted, p.rows));
}

void backward_cuda(const BackwardParams& p, float* workspace, void* stream) {
  DeviceNormBackward d = {};
  static_cast<DeviceNorm&>(d) = device_norm(p);
  const int64_t parts = backward_parts(p);
  d.mean = static_cast<float*>(const_cast<void*>(p.mean));
  d.rstd = static_cast<float*>(const_cast<void*>(p.rstd));
  d.h_in = p.h.data;
  d.dy = p.dy.data;
  d.dh = p.dh.data;
  d.dx = p.dx.data;
  d.dresidual = p.dresidual.data;
  d.dweight_parts = p.dweight.data == nullptr ? nullptr : workspace;
  d.dbias_parts = p.dbias.data == nullptr ? nullptr : workspace + parts * p.width;
  const bool vectors = aligned(d.x) && aligned(d.residual) && aligned(d.weight) &&
                       aligned(d.h_in) && aligned(d.dy) && aligned(d.dh) && aligned(d.dx) &&
                       aligned(d.dresidual) && p.width % 4 == 0;
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type), true>(
        p.width, vectors, [&](auto shape) { launch_backward<decltype(shape)>(d, parts, stream); });
  });
  add_up(d.dweight_parts, parts, p.dweight, p.width, stream);
  add_up(d.dbias_parts, parts, p.dbias, p.width, stream);
}

}  // namespace fused_attn::layer_norm
