// The ceiling that the matrix products of the CPU kernels are held against: multiply-adds in
// registers and nothing else. Benchmarks time a call and divide.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fused_attn {

// Does `repeats` rounds at the current level, in the arithmetic that a problem of `dtype` runs in,
// and returns the floating-point operations done.
double multiply_adds(DType dtype, int64_t repeats);

}  // namespace fused_attn
