// What the hardware does with a tensor map whose base lies before the tensor: a program of its own.
//
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a map_shift.cu -o map_shift && ./map_shift
//
// A tile is loaded, and another stored, through maps that are shifted back by 0 bytes to 4 GB, so
// that every address of the tile itself lies in the tensor. The tensor is what cudaMalloc gives,
// and then the end of a reserved range that has no memory before it. A fault ends a process's
// context, so each line of the table is a process of its own, and so is one that hangs.

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <sys/wait.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int kRows = 64, kColumns = 64, kRowBytes = 2 * kColumns, kTileBytes = kRows * kRowBytes;
constexpr int kLimitSeconds = 5;

[[noreturn]] void end(const std::string& answer) {
  std::printf("%s\n", answer.c_str());
  std::fflush(stdout);
  std::_Exit(answer == "right" ? 0 : 1);
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) end(std::string(cudaGetErrorName(status)) + " from " + what);
}

void check(CUresult status, const char* what) {
  if (status != CUDA_SUCCESS)
    end(std::string("CUresult ") + std::to_string(status) + " from " + what);
}

// A function of the driver: nothing links against libcuda.
template <typename Function>
Function driver(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &result),
        name);
  if (result != cudaDriverEntryPointSuccess) end(std::string("the driver has no ") + name);
  return reinterpret_cast<Function>(function);
}

// At coordinates (0, first, second, 0, 0): one tile to `memory`, or the other way round.
__global__ void copy_tile(const __grid_constant__ CUtensorMap map, int first, int second,
                          uint16_t* memory, bool store) {
  __shared__ alignas(1024) uint16_t tile[kRows * kColumns];
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t tile_at = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  const uint32_t barrier_at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (store) {
    for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) tile[i] = memory[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile(
          "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %2, %2}], "
          "[%1];\n"
          "cp.async.bulk.commit_group;\n"
          "cp.async.bulk.wait_group 0;" ::"l"(&map),
          "r"(tile_at), "r"(0), "r"(first), "r"(second)
          : "memory");
    }
    return;
  }
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_at));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_at),
                 "r"(kTileBytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %3, %3}], [%2];" ::"r"(tile_at),
        "l"(&map), "r"(barrier_at), "r"(0), "r"(first), "r"(second)
        : "memory");
  }
  __syncthreads();
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier_at)
      : "memory");
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) memory[i] = tile[i];
}

// The end of a range of addresses that has no memory in its first `gap` bytes.
char* after_nothing(size_t gap, size_t bytes) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
  size_t unit = 0;
  check(driver<PFN_cuMemGetAllocationGranularity_v10020>("cuMemGetAllocationGranularity", 10020)(
            &unit, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        "cuMemGetAllocationGranularity");
  const size_t before = (gap + unit - 1) / unit * unit, size = (bytes + unit - 1) / unit * unit;
  CUdeviceptr range = 0;
  check(driver<PFN_cuMemAddressReserve_v10020>("cuMemAddressReserve", 10020)(&range, before + size,
                                                                             0, 0, 0),
        "cuMemAddressReserve");
  CUmemGenericAllocationHandle handle = 0;
  check(driver<PFN_cuMemCreate_v10020>("cuMemCreate", 10020)(&handle, size, &prop, 0),
        "cuMemCreate");
  check(driver<PFN_cuMemMap_v10020>("cuMemMap", 10020)(range + before, size, 0, handle, 0),
        "cuMemMap");
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  check(
      driver<PFN_cuMemSetAccess_v10020>("cuMemSetAccess", 10020)(range + before, size, &access, 1),
      "cuMemSetAccess");
  return reinterpret_cast<char*>(range + before);
}

// The kernels' ragged map: dimensions 1 and 2 have one stride, and the first one's bound ends a
// sequence where it ends. Shift 0 is the plain map.
CUtensorMap make_map(char* tensor, size_t shift) {
  const cuuint64_t window = shift == 0 ? kRows : shift / kRowBytes;
  const cuuint64_t size[] = {kColumns, window, kRows + 1, 1, 1};
  const cuuint64_t stride[] = {kRowBytes, kRowBytes, kTileBytes, kTileBytes};
  const cuuint32_t box[] = {kColumns, kRows, 1, 1, 1}, step[] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  check(driver<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000)(
            &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, tensor - shift, size, stride, box, step,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
  return map;
}

void answer(bool reserved, bool store, size_t shift) {
  check(cudaSetDevice(0), "cudaSetDevice");
  check(cudaFree(nullptr), "cudaFree");  // makes the context
  std::vector<uint16_t> numbers(kRows * kColumns), found(kRows * kColumns);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint16_t>(i + 1);
  char* tensor = nullptr;
  uint16_t* other = nullptr;
  if (reserved) {
    tensor = after_nothing(shift, kTileBytes);
  } else {
    check(cudaMalloc(&tensor, kTileBytes), "cudaMalloc");
  }
  check(cudaMalloc(&other, kTileBytes), "cudaMalloc");
  void* from = store ? static_cast<void*>(other) : tensor;
  void* to = store ? static_cast<void*>(tensor) : other;
  check(cudaMemset(to, 0, kTileBytes), "cudaMemset");
  check(cudaMemcpy(from, numbers.data(), kTileBytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  const CUtensorMap map = make_map(tensor, shift);
  const int first = shift == 0 ? 0 : static_cast<int>(shift / kRowBytes) - kRows;
  copy_tile<<<1, 128>>>(map, first, shift == 0 ? 0 : kRows, other, store);
  check(cudaGetLastError(), "the launch");
  check(cudaDeviceSynchronize(), "the kernel");
  check(cudaMemcpy(found.data(), to, kTileBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (found[i] != numbers[i]) {
      end("wrong: element " + std::to_string(i) + " is " + std::to_string(found[i]) + ", not " +
          std::to_string(numbers[i]));
    }
  }
  end("right");
}

// What a process of its own says.
std::string ask(const char* self, const char* memory, const char* what, size_t shift) {
  const std::string command = "timeout -s KILL " + std::to_string(kLimitSeconds) + " '" + self +
                              "' " + memory + " " + what + " " + std::to_string(shift) + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "cannot be started";
  char line[256] = "";
  const bool said = std::fgets(line, sizeof line, pipe) != nullptr;
  const int status = pclose(pipe);
  line[std::strcspn(line, "\n")] = 0;
  if (said) return line;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return code == 137 ? "hung: killed after " + std::to_string(kLimitSeconds) + " s"
                     : "ended with status " + std::to_string(code) + " and said nothing";
}

}  // namespace

int main(int count, char** words) {
  if (count == 4) {
    answer(!std::strcmp(words[1], "reserved"), !std::strcmp(words[2], "store"),
           std::strtoull(words[3], nullptr, 10));
  }
  const struct {
    const char* name;
    size_t bytes;
  } shifts[] = {{"0", 0},
                {"2 MB", 2ull << 20},
                {"64 MB", 64ull << 20},
                {"1 GB", 1ull << 30},
                {"4 GB", 4ull << 30}};
  bool plain = true;
  std::printf("%-9s %-6s %-7s %s\n", "memory", "shift", "what", "answer");
  for (const char* memory : {"malloc", "reserved"}) {
    for (const auto& shift : shifts) {
      for (const char* what : {"load", "store"}) {
        const std::string said = ask(words[0], memory, what, shift.bytes);
        plain = plain && (shift.bytes != 0 || said == "right");
        std::printf("%-9s %-6s %-7s %s\n", memory, shift.name, what, said.c_str());
        std::fflush(stdout);
      }
    }
  }
  return plain ? 0 : 1;  // what the shifted ones do is the question, not a fault
}
