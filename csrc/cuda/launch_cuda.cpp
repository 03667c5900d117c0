#include "cuda/launch_cuda.h"

#include <cudaTypedefs.h>

#include <algorithm>
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
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (!allowed.insert({device, kernel}).second) return;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (status != cudaSuccess) allowed.erase({device, kernel});
  check_cuda(status, "cudaFuncSetAttribute");
}

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

namespace {

// The driver's encoder, asked for at run time: nothing links against libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is too old");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

}  // namespace

TensorMap make_tensor_map(const MapRequest& r) {
  const MapGeometry geometry(r);
  cuuint64_t size[kTensorMapRank], stride[kTensorMapRank - 1];
  std::copy(geometry.size, geometry.size + kTensorMapRank, size);
  std::copy(geometry.stride_bytes, geometry.stride_bytes + kTensorMapRank - 1, stride);
  const cuuint32_t box[] = {kTileColumns, static_cast<cuuint32_t>(r.box_rows), 1, 1, 1};
  const cuuint32_t step[] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kTensorMapRank, geometry.base, size, stride,
                box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace fused_attn::device
