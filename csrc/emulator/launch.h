// Launches of the emulated device: block after block, in random order.
#pragma once

#include <functional>
#include <string>

#include "cuda/launch_shape.h"

namespace fused_attn::emulator {

// The schedule of the next launches; each launch moves on to the next.
void set_seed(uint64_t seed);

// The next launch fails as if CUDA had said so; nothing runs.
void fail_next_launch(int code, const std::string& name);

// Matrix instructions executed so far: tells what kernels did not compute.
uint64_t matrix_products();

// Runs all blocks; throws std::runtime_error with what the machine found fault with.
void run_blocks(const device::LaunchShape& shape, const std::function<void()>& block);

}  // namespace fused_attn::emulator

namespace fused_attn::device {

template <class... Arguments>
void launch(void (*kernel)(Arguments...), const LaunchShape& shape, Stream /*stream*/,
            const Arguments&... arguments) {
  emulator::run_blocks(shape, [&] { kernel(arguments...); });
}

}  // namespace fused_attn::device
