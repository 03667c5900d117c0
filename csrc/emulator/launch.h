// Launches of the emulated device: block after block, in random order.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/launch_shape.h"

namespace fused_attn::emulator {

// The schedule of the next launches; each launch moves on to the next.
void set_seed(uint64_t seed);

// Matrix instructions executed so far: tells what kernels did not compute.
uint64_t matrix_products();

// Of the calling thread's next launch: what the runtime's configuration does not tell.
void expect_launch(const device::LaunchShape& shape);

// The tensor that the calling thread's next map is of: a map does not tell, but loads through one
// whose base is elsewhere fail.
void set_mapped_tensor(const void* data);

}  // namespace fused_attn::emulator
