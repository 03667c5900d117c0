// As much of libcuda.so.1 as Triton's launcher calls, for a machine without a GPU: nothing runs.
// What reaches a launch is kept on request, so that tests can compare it byte for byte.
#include <cuda.h>
#include <string.h>

#define MAX_FUNCTIONS 4096
#define MAX_PARAMETERS 128
#define MAX_LAUNCHES 32

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *function;
  int bytes;
  char parameters[8192];
} Launch;

static struct {
  int count, sizes[MAX_PARAMETERS];
} described[MAX_FUNCTIONS];  // by handle
static Launch kept[MAX_LAUNCHES];
static int num_kept;
static long launches, questions;

// The parameters of this function, whose handle is a small number, have these sizes in bytes: what
// it is launched with is kept from now on.
void fake_describe(int function, int count, const int* sizes) {
  described[function].count = count;
  memcpy(described[function].sizes, sizes, sizeof(int) * count);
}
int fake_kept(void) {
  return num_kept;
}
const void* fake_launch(int number) {
  return &kept[number];
}
void fake_forget(void) {
  num_kept = 0;
}
long fake_launches(void) {
  return launches;
}
long fake_questions(void) {
  return questions;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  (void)extra;
  ++launches;
  const size_t handle = (size_t)function;
  if (handle >= MAX_FUNCTIONS || described[handle].count == 0) return CUDA_SUCCESS;
  if (num_kept == MAX_LAUNCHES) num_kept = 0;  // nobody asked for them
  Launch* to = &kept[num_kept++];
  to->grid[0] = config->gridDimX, to->grid[1] = config->gridDimY, to->grid[2] = config->gridDimZ;
  to->block[0] = config->blockDimX, to->block[1] = config->blockDimY;
  to->block[2] = config->blockDimZ, to->shared = config->sharedMemBytes;
  to->stream = config->hStream, to->function = function, to->bytes = 0;
  for (int i = 0; i < described[handle].count; ++i) {
    const int size = described[handle].sizes[i];
    if (to->bytes + size > (int)sizeof(to->parameters)) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(to->parameters + to->bytes, parameters[i], size);
    to->bytes += size;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  ++questions;
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
  ++questions;
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
  *context = (CUcontext)kept;
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
