#include "emulator/global_writes.h"

namespace fused_attn::emulator {

void GlobalWrites::reset() {
  pages_.clear();
  last_page_ = nullptr;
}

GlobalWrites::Page& GlobalWrites::page(uintptr_t number) {
  if (last_page_ == nullptr || number != last_number_) {
    std::unique_ptr<Page>& found = pages_[number];
    if (!found) found = std::make_unique<Page>();
    last_page_ = found.get();
    last_number_ = number;
  }
  return *last_page_;
}

bool GlobalWrites::conflict(Writers& writers, int block, bool atomically) {
  const auto other = [&](int32_t writer) { return writer != -1 && writer != block; };
  const bool added = other(writers.additions);
  const bool found = other(writers.stores) || (added && !atomically);
  if (!atomically) {
    writers.stores = block;
  } else {
    writers.additions = added ? kMany : block;
  }
  return found;
}

bool GlobalWrites::conflicts(const void* address, uint32_t bytes, int block, bool atomically) {
  constexpr uintptr_t kUnits = kPageBytes / kUnit;
  const auto first = reinterpret_cast<uintptr_t>(address) / kUnit;
  const uintptr_t count = (bytes + kUnit - 1) / kUnit;
  bool found = false;
  for (uintptr_t unit = first; unit < first + count; ++unit) {
    found = conflict(page(unit / kUnits)[unit % kUnits], block, atomically) || found;
  }
  return found;
}

}  // namespace fused_attn::emulator
