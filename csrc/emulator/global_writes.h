// Who has written what of global memory in a launch: blocks run in any order, side by side, so what
// two of them write has no value that anybody could promise. Sums of atomic additions may have many
// writers, if nobody stores there as well.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace fused_attn::emulator {

class GlobalWrites {
 public:
  void reset();  // a launch begins

  // `block` writes `bytes` at `address`. Does another block write there, too?
  bool conflicts(const void* address, uint32_t bytes, int block, bool atomically);

 private:
  static constexpr uintptr_t kUnit = 2, kPageBytes = 4096;
  struct Writers {
    int32_t stores = -1, additions = -1;  // a block; kMany
  };
  static constexpr int32_t kMany = -2;
  using Page = std::array<Writers, kPageBytes / kUnit>;
  Page& page(uintptr_t number);
  static bool conflict(Writers& writers, int block, bool atomically);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
};

}  // namespace fused_attn::emulator
