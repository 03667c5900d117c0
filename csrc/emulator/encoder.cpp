#include "emulator/encoder.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "emulator/launch.h"
#include "emulator/runtime.h"

namespace fused_attn::emulator {
namespace {

thread_local const void* mapped_tensor = nullptr;

std::string in_dimension(const char* text, int dimension, uint64_t value) {
  return std::string(text) + " in dimension " + std::to_string(dimension) + ": " +
         std::to_string(value);
}

std::string wrong_sizes(const EncoderCall& c) {
  for (int d = 0; d < c.rank; ++d) {
    if (c.size[d] == 0 || c.size[d] > uint64_t{1} << 32) return in_dimension("size", d, c.size[d]);
    if (c.box[d] == 0 || c.box[d] > 256) return in_dimension("box", d, c.box[d]);
    if (c.step[d] == 0 || c.step[d] > 8) return in_dimension("element stride", d, c.step[d]);
  }
  const uint64_t multiple = c.interleave == 2 ? 32 : 16;
  for (int d = 1; d < c.rank; ++d) {
    const uint64_t stride = c.stride[d - 1];
    if (stride == 0 || stride % multiple != 0 || stride >= uint64_t{1} << 40) {
      return in_dimension("stride", d, stride);
    }
  }
  return "";
}

}  // namespace

// The requirements of the driver's documentation, for types of whole bytes.
std::string why_not_encoded(const EncoderCall& c) {
  if (c.rank < 1 || c.rank > kMaxMapRank) return "rank " + std::to_string(c.rank);
  if (c.interleave != 0 && c.rank < 3) return "interleave of rank " + std::to_string(c.rank);
  if (c.address % (c.interleave == 2 ? 32 : 16) != 0) return "address";
  const std::string wrong = wrong_sizes(c);
  if (!wrong.empty()) return wrong;
  const uint32_t row = c.box[0] * static_cast<uint32_t>(c.element_bytes);
  if (c.interleave == 0 && row % 16 != 0) return "box rows of " + std::to_string(row) + " bytes";
  if (c.interleave == 2 && c.swizzle != 1) return "interleave without its swizzle";
  if (c.interleave == 0 && c.swizzle != 0 && row > 16u << c.swizzle) {
    return "swizzle of box rows of " + std::to_string(row) + " bytes";
  }
  return "";
}

void set_mapped_tensor(const void* data) {
  mapped_tensor = data;
}

DecodedMap decode(const CUtensorMap& map) {
  DecodedMap result;
  std::memcpy(&result, &map, sizeof result);
  return result;
}

CUresult CUDAAPI encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                   void* address, const cuuint64_t* size, const cuuint64_t* stride,
                                   const cuuint32_t* box, const cuuint32_t* step,
                                   CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (bound_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  EncoderCall call;
  call.rank = static_cast<int>(rank);
  call.address = reinterpret_cast<uint64_t>(address);
  if (rank >= 1 && rank <= kMaxMapRank) {
    std::copy(size, size + rank, call.size);
    std::copy(stride, stride + rank - 1, call.stride);
    std::copy(box, box + rank, call.box);
    std::copy(step, step + rank, call.step);
  }
  call.interleave = interleave;
  call.swizzle = swizzle;
  const bool ours = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 &&
                    fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                    reinterpret_cast<uintptr_t>(map) % 64 == 0;
  if (!ours || !why_not_encoded(call).empty()) return CUDA_ERROR_INVALID_VALUE;
  DecodedMap decoded = {};
  decoded.base = address;
  decoded.tensor = mapped_tensor;
  decoded.stride[0] = 2;
  std::copy(call.size, call.size + rank, decoded.size);
  std::copy(call.stride, call.stride + rank - 1, decoded.stride + 1);
  decoded.rank = call.rank;
  decoded.box_rows = rank > 1 ? static_cast<int32_t>(box[1]) : 1;
  std::memcpy(static_cast<void*>(map), &decoded, sizeof decoded);
  return CUDA_SUCCESS;
}

}  // namespace fused_attn::emulator
