// The CUDA runtime of the emulated device: what the host code of the kernels calls
// (toolkit/cuda_runtime.h), as strict as a GPU's. It keeps a shared-memory limit for each kernel
// and device, a context for each thread, and the last error; tests set it up and ask what was
// called.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <string>

namespace fused_attn::emulator {

// Forgets calls and injected failures, and what was bound to the calling thread; `count` devices,
// the current one is 0. What kernels were allowed stays, as launchers remember it too.
void reset_runtime(int count);

// How often each function was called since then, by its name.
std::map<std::string, int> runtime_calls();

// The device of the calling thread's context, -1 = none; and its last error, 0 = none.
int bound_device();
int last_error();

// The next call of `function` fails with this error and does nothing.
void fail_next_call(const std::string& function, int code, const std::string& name);

// What a launch does before its blocks run.
cudaError_t begin_launch(const cudaLaunchConfig_t& config, const void* kernel);

// Does as cuTensorMapEncodeTiled of a 16-bit tensor does: what it refuses, or "" if nothing. Arrays
// are those of the driver's call.
struct EncoderCall {
  int rank = 5;
  uint64_t address = 0;
  uint64_t size[5] = {}, stride[4] = {};
  uint32_t box[5] = {}, step[5] = {};
  int element_bytes = 2;
  int interleave = 0, swizzle = 3;
};
std::string why_not_encoded(const EncoderCall& call);

}  // namespace fused_attn::emulator
