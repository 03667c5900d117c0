// Launches on a real device, through the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "cuda/launch_error.h"
#include "cuda/launch_shape.h"

namespace fused_attn::device {

// Throws std::runtime_error "`what` failed: NAME (text)" unless `status` is success; the error does
// not stay behind for the next call.
void check_cuda(cudaError_t status, const char* what);

// Of the runtime that is linked in, and the newest that the driver serves (0: there is none), as
// CUDA counts: 13010 is 13.1. Starts nothing.
std::pair<int, int> cuda_versions();

// A kernel may use more than 48 KiB of shared memory once it is told so, on each device.
void allow_shared_memory(const void* kernel, uint32_t bytes);

template <class... Arguments>
void launch(void (*kernel)(Arguments...), const LaunchShape& shape, Stream stream,
            const Arguments&... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, Arguments(arguments)...), shape.kernel);
}

}  // namespace fused_attn::device
