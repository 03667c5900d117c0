#include "emulator/launch.h"

#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch_error.h"
#include "emulator/machine.h"

namespace fused_attn::emulator {
namespace {
uint64_t seed = 1;
uint64_t products = 0;

struct {
  int code = 0;
  std::string name;
} failure;
}  // namespace

void set_seed(uint64_t value) {
  seed = value;
}

void fail_next_launch(int code, const std::string& name) {
  failure = {code, name};
}

uint64_t matrix_products() {
  return products;
}

void run_blocks(const device::LaunchShape& shape, const std::function<void()>& block) {
  if (failure.code != 0) {
    const auto injected = std::exchange(failure, {});
    device::fail_launch(shape.kernel, injected.code, injected.name.c_str(), "injected");
  }
  std::vector<int> order(static_cast<std::size_t>(shape.blocks));
  std::iota(order.begin(), order.end(), 0);
  Random random;
  random.seed(seed++);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (const int index : order) {
    Launch launch;
    launch.block = index;
    launch.blocks = static_cast<int>(shape.blocks);
    launch.threads = shape.threads;
    launch.shared_bytes = shape.shared_bytes;
    launch.registers_per_thread = shape.registers;
    launch.seed = random.next();
    const Report report = Machine::instance().run(launch, block);
    products += report.products;
    if (report.faults.empty()) continue;
    std::string text = std::string(shape.kernel) + " on the emulator:";
    for (const std::string& fault : report.faults) text += "\n  " + fault;
    throw std::runtime_error(text);
  }
}

}  // namespace fused_attn::emulator

namespace fused_attn::device {

int multiprocessors() {
  return 2;
}

TensorMap make_tensor_map(const MapRequest& r) {
  if (!can_map(r.data, r.stride_batch, r.stride_head, r.stride_row, 1) || r.box_rows > 256) {
    throw std::runtime_error("a tensor map that the copy engine would refuse");
  }
  const MapGeometry geometry(r);
  TensorMap map;
  map.base = geometry.base;
  map.size[0] = geometry.size[0];
  map.stride_bytes[0] = 2;
  for (int d = 1; d < kTensorMapRank; ++d) {
    map.size[d] = geometry.size[d];
    map.stride_bytes[d] = geometry.stride_bytes[d - 1];
  }
  map.box_rows = r.box_rows;
  return map;
}

}  // namespace fused_attn::device
