#include "cuda/launch.h"

#include <cudaTypedefs.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fused_attn::device {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail_launch(what, status, cudaGetErrorName(status), cudaGetErrorString(status));
}

std::pair<int, int> cuda_versions() {
  int runtime = 0, driver = 0;
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return {runtime, driver};
}

void allow_shared_memory(const void* kernel, uint32_t bytes) {
  constexpr uint32_t kAlwaysAllowed = 48 << 10;
  if (bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, uint32_t> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  uint32_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "cudaFuncSetAttribute");
  most = bytes;
}

cudaLaunchConfig_t launch_config(const LaunchShape& shape, Stream stream) {
  constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (shape.blocks > kMaxBlocks) {
    throw std::runtime_error(std::string(shape.kernel) + " needs " + std::to_string(shape.blocks) +
                             " blocks, a grid has " + std::to_string(kMaxBlocks) + " at most");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

namespace {

// The driver's function for the encoder, asked for at run time: nothing links against libcuda.
cudaError_t find_encoder(void** function, cudaDriverEntryPointQueryResult* result) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion(kName, function, 12000, cudaEnableDefault, result);
#else
  return cudaGetDriverEntryPoint(kName, function, cudaEnableDefault, result);
#endif
}

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(find_encoder(&function, &result), "asking the driver for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is too old");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// The encoder refuses a thread that has no context yet; only launches bind one by themselves.
void bind_context() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaSetDevice(device), "cudaSetDevice");
}

}  // namespace

TensorMap make_tensor_map(const MapRequest& r) {
  bind_context();
#if defined(FUSED_ATTN_EMULATED)
  emulator::set_mapped_tensor(r.data);
#endif
  const MapGeometry geometry(r);
  cuuint64_t size[kTensorMapRank], stride[kTensorMapRank - 1];
  std::copy(geometry.size, geometry.size + kTensorMapRank, size);
  std::copy(geometry.stride_bytes, geometry.stride_bytes + kTensorMapRank - 1, stride);
  const cuuint32_t box[] = {kTileColumns, static_cast<cuuint32_t>(r.box_rows), 1, 1, 1};
  const cuuint32_t step[] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kTensorMapRank, const_cast<void*>(r.data),
                size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace fused_attn::device
