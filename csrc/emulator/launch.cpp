#include "emulator/launch.h"

#include <cuda_runtime.h>

#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/machine.h"
#include "emulator/runtime.h"

namespace fused_attn::emulator {
namespace {
uint64_t seed = 1;
uint64_t products = 0;
thread_local device::LaunchShape expected = {};
}  // namespace

void set_seed(uint64_t value) {
  seed = value;
}

uint64_t matrix_products() {
  return products;
}

void expect_launch(const device::LaunchShape& shape) {
  expected = shape;
}

// Runs all blocks; throws std::runtime_error with what the machine found fault with.
cudaError_t launch_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                          const std::function<void()>& block) {
  if (const cudaError_t status = begin_launch(config, kernel)) return status;
  std::vector<int> order(config.gridDim.x);
  std::iota(order.begin(), order.end(), 0);
  Random random;
  random.seed(seed++);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  Machine::instance().global_writes.reset();
  for (const int index : order) {
    Launch launch;
    launch.block = index;
    launch.blocks = static_cast<int>(config.gridDim.x);
    launch.threads = static_cast<int>(config.blockDim.x);
    launch.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
    launch.registers_per_thread = expected.registers;
    launch.seed = random.next();
    const Report report = Machine::instance().run(launch, block);
    products += report.products;
    if (report.faults.empty()) continue;
    std::string text = std::string(expected.kernel) + " on the emulator:";
    for (const std::string& fault : report.faults) text += "\n  " + fault;
    throw std::runtime_error(text);
  }
  return cudaSuccess;
}

}  // namespace fused_attn::emulator
