// Host side of a launch: tensor maps, the stream, and a kernel started on it, through the CUDA
// runtime. In tests that is the emulated device's (emulator/toolkit), under the same source.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/launch_error.h"
#include "cuda/launch_shape.h"

#if defined(FUSED_ATTN_EMULATED)
#include "emulator/launch.h"
#endif

namespace fused_attn::device {

// Throws std::runtime_error "`what` failed: NAME (text)" unless `status` is success; the error does
// not stay behind for the next call.
void check_cuda(cudaError_t status, const char* what);

// Of the runtime that is linked in, and the newest that the driver serves (0: there is none), as
// CUDA counts: 13010 is 13.1. Starts nothing.
std::pair<int, int> cuda_versions();

// A kernel may use more than 48 KiB of shared memory once it is told so, on each device. The most
// that was asked for stays: later calls of the kernel may ask for more, or less.
void allow_shared_memory(const void* kernel, uint32_t bytes);

// The configuration of a launch. Throws where a grid has no room for the blocks.
cudaLaunchConfig_t launch_config(const LaunchShape& shape, Stream stream);

template <class... Arguments>
void launch(void (*kernel)(Arguments...), const LaunchShape& shape, Stream stream,
            const Arguments&... arguments) {
  const cudaLaunchConfig_t config = launch_config(shape, stream);
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
#if defined(FUSED_ATTN_EMULATED)
  emulator::expect_launch(shape);
#endif
  check_cuda(cudaLaunchKernelEx(&config, kernel, Arguments(arguments)...), shape.kernel);
}

}  // namespace fused_attn::device
