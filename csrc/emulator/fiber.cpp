#include "emulator/fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

// Saves the registers that a call preserves and the stack pointer to *from, takes those of `to`.
extern "C" void fused_attn_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl fused_attn_emulator_switch
.hidden fused_attn_emulator_switch
.type fused_attn_emulator_switch, @function
fused_attn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_attn_emulator_switch, .-fused_attn_emulator_switch
)");

namespace fused_attn::emulator {

void Fiber::prepare(void (*entry)()) {
  if (!stack_) stack_ = std::make_unique<char[]>(kStackBytes);
  const auto top =
      reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) & ~std::uintptr_t{63};
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;                              // where `entry` would return to
  *--slot = reinterpret_cast<void*>(entry);       // what the first switch returns to
  for (int i = 0; i < 6; ++i) *--slot = nullptr;  // the registers that it restores
  own_ = slot;
}

void Fiber::resume() {
  fused_attn_emulator_switch(&resumer_, own_);
}

void Fiber::yield() {
  fused_attn_emulator_switch(&own_, resumer_);
}

}  // namespace fused_attn::emulator
