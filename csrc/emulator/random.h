#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_attn::emulator {

// xorshift64 (Marsaglia, "Xorshift RNGs", 2003): fast, and the same everywhere.
class Random {
 public:
  void seed(uint64_t value) {
    state_ = value * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 8; ++i) next();
  }
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  std::size_t below(std::size_t count) { return (next() >> 16) % count; }
  bool chance(int of_1024) { return static_cast<int>(next() >> 20 & 1023) < of_1024; }

 private:
  uint64_t state_ = 1;
};

}  // namespace fused_attn::emulator
