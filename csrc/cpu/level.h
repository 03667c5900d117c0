// Instruction-set levels of the CPU kernels and the choice between them.
//
// A kernel source is compiled once per level (csrc/cpu/levels.cmake) with FUSED_ATTN_LEVEL set to
// the level's name and FUSED_ATTN_LEVEL_ID to its number below; everything in it lives in a
// namespace of that name, and a table indexed by level leads to it.
#pragma once

#include <string>
#include <vector>

#include "common/types.h"

namespace fused_attn {

enum class CpuLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kNumCpuLevels = 4;

// The best level of this machine, or the one that the environment variable FUSED_ATTN_CPU names.
// Throws std::runtime_error (once for each call) if that level is unknown or not available.
CpuLevel cpu_level();

// The level whose kernels run problems of this dtype (see kernel_dtypes.h): cpu_level() or lower.
CpuLevel kernel_level(DType dtype);

const char* level_name(CpuLevel level);
std::string current_level_name();
std::vector<std::string> available_levels();  // lowest first

}  // namespace fused_attn
