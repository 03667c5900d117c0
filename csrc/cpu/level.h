// The choice between the instruction-set levels of the CPU kernels (cpu/levels.h).
//
// A kernel source is compiled once per level (csrc/cpu/levels.cmake) with FUSED_ATTN_LEVEL set to
// the level's name; everything in it lives in a namespace of that name, and cpu/dispatch.h leads to
// it.
#pragma once

#include <string>
#include <vector>

#include "common/types.h"
#include "cpu/kernel_dtypes.h"

namespace fused_attn {

// The best level of this machine, or the one that the environment variable FUSED_ATTN_CPU names.
// Throws std::runtime_error (once for each call) if that level is unknown or not available.
CpuLevel cpu_level();

// The level whose kernels run problems of this dtype: cpu_level() or lower.
CpuLevel kernel_level(DType dtype);

const char* level_name(CpuLevel level);
std::string current_level_name();
std::vector<std::string> available_levels();  // lowest first

// The best level of this machine where this build was made for a lower one, else "".
std::string level_left_out();

// Do the kernels of bfloat16 multiply tiles (BF16_TILES in cpu/levels.h)?
bool multiplies_tiles();

// "amd", "intel", or "" for any other.
std::string cpu_vendor();

}  // namespace fused_attn
