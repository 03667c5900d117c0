// As much of libcuda.so.1 as Triton's launcher calls, for a machine without a GPU: nothing runs.
// What reaches a launch is kept on request, so that tests can compare it byte for byte.
#include <cuda.h>
#include <string.h>

#define MAX_PARAMETERS 128
#define MAX_BYTES 8192

static struct {
  unsigned grid[3], block[3], shared;
  void *stream, *function;
  int bytes;
  char parameters[MAX_BYTES];
} last;
static int sizes[MAX_PARAMETERS], num_sizes;
static long launches, pointer_queries;

// The parameters of the launches from now on have these sizes in bytes; 0 of them: keep nothing.
void fake_sizes(int count, const int* given) {
  num_sizes = count;
  memcpy(sizes, given, sizeof(int) * count);
}
long fake_launches(void) {
  return launches;
}
long fake_pointer_queries(void) {
  return pointer_queries;
}
const void* fake_last(void) {
  return &last;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  (void)extra;
  ++launches;
  if (num_sizes == 0) return CUDA_SUCCESS;
  last.grid[0] = config->gridDimX, last.grid[1] = config->gridDimY;
  last.grid[2] = config->gridDimZ;
  last.block[0] = config->blockDimX, last.block[1] = config->blockDimY;
  last.block[2] = config->blockDimZ, last.shared = config->sharedMemBytes;
  last.stream = config->hStream, last.function = function, last.bytes = 0;
  for (int i = 0; i < num_sizes && last.bytes + sizes[i] <= MAX_BYTES; ++i) {
    memcpy(last.parameters + last.bytes, parameters[i], sizes[i]);
    last.bytes += sizes[i];
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  ++pointer_queries;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

// A tensor map: what it was made of, so that other arguments make another one.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes_of,
                                const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  (void)steps, (void)interleave, (void)promotion, (void)fill;
  memset(map, 0, sizeof(*map));
  map->opaque[0] = (cuuint64_t)address;
  map->opaque[2] = type | rank << 8 | swizzle << 16;
  for (cuuint32_t i = 0; i < rank && i < 4; ++i) {
    map->opaque[3 + i] = sizes_of[i];
    map->opaque[7 + i] = box[i];
    if (i + 1 < rank) map->opaque[11 + i] = strides[i];
  }
  return CUDA_SUCCESS;
}

// Every module is its image, and every function its module: what is loaded anew has a new place.
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  (void)name;
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = 13020;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)&last;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
#define ACCEPT(name, ...)      \
  CUresult name(__VA_ARGS__) { \
    return CUDA_SUCCESS;       \
  }
ACCEPT(cuCtxGetLimit, size_t* value, CUlimit limit)
ACCEPT(cuCtxSetLimit, CUlimit limit, size_t value)
ACCEPT(cuCtxSetCurrent, CUcontext context)
ACCEPT(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)
ACCEPT(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
ACCEPT(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
ACCEPT(cuOccupancyMaxActiveClusters, int* count, CUfunction function, const CUlaunchConfig* config)
