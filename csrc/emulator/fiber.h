// Cooperative threads: each CUDA thread of the emulated block is one fiber on its own stack.
//
// ucontext would do, but it saves signal masks by system calls, and a block switches some hundred
// thousand times.
#pragma once

#include <cstddef>
#include <memory>

namespace fused_attn::emulator {

class Fiber {
 public:
  // Prepares the fiber to run `entry` when it is next switched to. `entry` must never return.
  void prepare(void (*entry)());

  // From the scheduler: runs the fiber until it yields.
  void resume();
  // From inside the fiber: back to whoever resumed it.
  void yield();

 private:
  static constexpr std::size_t kStackBytes = 128 * 1024;

  std::unique_ptr<char[]> stack_;
  void* own_ = nullptr;      // stack pointer while suspended
  void* resumer_ = nullptr;  // stack pointer of the scheduler while running
};

}  // namespace fused_attn::emulator
