#include "emulator/runtime.h"

#include <cuda_runtime.h>

#include <mutex>
#include <utility>

#include "emulator/encoder.h"

namespace fused_attn::emulator {
namespace {

constexpr int kPlainSharedBytes = 48 << 10;  // without being asked for
constexpr int kMostSharedBytes = 227 << 10;
constexpr unsigned kMostThreads = 1024, kMostBlocks = 0x7fffffff;

struct Failure {
  int code = 0;
  std::string name;
};

struct {
  std::mutex mutex;
  int devices = 1;
  std::map<std::pair<int, const void*>, int> limits;  // of dynamic shared memory
  std::map<std::string, int> calls;
  std::map<std::string, Failure> failures;
  std::map<int, std::string> injected_names;
} state;

thread_local int device = 0;
thread_local int context = -1;
thread_local cudaError_t error = cudaSuccess;

cudaError_t failed(cudaError_t code) {
  if (code != cudaSuccess) error = code;
  return code;
}

// Counts the call; the error that a test has asked for.
cudaError_t called(const char* function) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  ++state.calls[function];
  const auto found = state.failures.find(function);
  if (found == state.failures.end()) return cudaSuccess;
  const Failure failure = found->second;
  state.failures.erase(found);
  state.injected_names[failure.code] = failure.name;
  return failed(static_cast<cudaError_t>(failure.code));
}

cudaError_t set_limit(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > kMostSharedBytes) return failed(cudaErrorInvalidValue);
  context = device;
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.limits[{device, kernel}] = bytes;
  return cudaSuccess;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (grid.x == 0 || grid.x > kMostBlocks || grid.y != 1 || grid.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x == 0 || block.x > kMostThreads || block.y != 1 || block.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = state.limits.find({device, kernel});
  const int limit = found == state.limits.end() ? kPlainSharedBytes : found->second;
  if (config.dynamicSmemBytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t find_function(const char* symbol, void** function,
                          cudaDriverEntryPointQueryResult* status) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tensor_map) : nullptr;
  *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // namespace

void reset_runtime(int count) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.devices = count;
  state.calls.clear();
  state.failures.clear();
  device = 0;
  context = -1;
  error = cudaSuccess;
}

std::map<std::string, int> runtime_calls() {
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.calls;
}

int bound_device() {
  return context;
}

int last_error() {
  return error;
}

void fail_next_call(const std::string& function, int code, const std::string& name) {
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.failures[function] = {code, name};
}

cudaError_t begin_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  if (const cudaError_t status = called("cudaLaunchKernelExC")) return status;
  context = device;
  return failed(check_launch(config, kernel));
}

}  // namespace fused_attn::emulator

using fused_attn::emulator::called;
using fused_attn::emulator::failed;

extern "C" {

cudaError_t CUDARTAPI cudaGetLastError(void) {
  return std::exchange(fused_attn::emulator::error, cudaSuccess);
}

cudaError_t CUDARTAPI cudaPeekAtLastError(void) {
  return fused_attn::emulator::error;
}

const char* CUDARTAPI cudaGetErrorName(cudaError_t code) {
  const auto& names = fused_attn::emulator::state.injected_names;
  const auto found = names.find(code);
  if (found != names.end()) return found->second.c_str();
  switch (code) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    default:
      return "cudaErrorUnknown";
  }
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t code) {
  return fused_attn::emulator::state.injected_names.count(code) != 0 ? "injected" : "emulated";
}

cudaError_t CUDARTAPI cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return called("cudaRuntimeGetVersion");
}

cudaError_t CUDARTAPI cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return called("cudaDriverGetVersion");
}

cudaError_t CUDARTAPI cudaGetDevice(int* current) {
  *current = fused_attn::emulator::device;
  return called("cudaGetDevice");
}

cudaError_t CUDARTAPI cudaSetDevice(int wanted) {
  if (const cudaError_t status = called("cudaSetDevice")) return status;
  if (wanted < 0 || wanted >= fused_attn::emulator::state.devices) {
    return failed(cudaErrorInvalidDevice);
  }
  fused_attn::emulator::device = fused_attn::emulator::context = wanted;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int) {
  if (const cudaError_t status = called("cudaDeviceGetAttribute")) return status;
  if (attribute != cudaDevAttrMultiProcessorCount) return failed(cudaErrorInvalidValue);
  *value = 2;
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute,
                                           int value) {
  if (const cudaError_t status = called("cudaFuncSetAttribute")) return status;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return failed(cudaErrorInvalidValue);
  }
  return fused_attn::emulator::set_limit(function, value);
}

#if CUDART_VERSION >= 12050
cudaError_t CUDARTAPI
cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int,
                                 unsigned long long, enum cudaDriverEntryPointQueryResult* status) {
  if (const cudaError_t failure = called("cudaGetDriverEntryPointByVersion")) return failure;
  return fused_attn::emulator::find_function(symbol, function, status);
}
#else
cudaError_t CUDARTAPI cudaGetDriverEntryPoint(const char* symbol, void** function,
                                              unsigned long long,
                                              enum cudaDriverEntryPointQueryResult* status) {
  if (const cudaError_t failure = called("cudaGetDriverEntryPoint")) return failure;
  return fused_attn::emulator::find_function(symbol, function, status);
}
#endif

}  // extern "C"
