// What a failed call of the CUDA runtime is reported as.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fused_attn::device {

// Errors after which no call in this process can succeed, by CUDA's numbers: a kernel did something
// that cost the device's context (illegal address and instruction, misaligned address, assertion,
// hardware stack and address space, time-out, launch failure, uncorrectable memory).
inline bool is_sticky(int code) {
  for (const int lost : {214, 700, 702, 710, 714, 715, 716, 717, 718, 719}) {
    if (code == lost) return true;
  }
  return false;
}

[[noreturn]] inline void fail_launch(const char* what, int code, const char* name,
                                     const char* text) {
  std::string message = std::string(what) + " failed: " + name + " (" + text + ")";
  if (is_sticky(code)) {
    message +=
        ". A kernel that ran before has lost this process its CUDA context: start a new one, with "
        "CUDA_LAUNCH_BLOCKING=1 to see which kernel it was";
  }
  throw std::runtime_error(message);
}

}  // namespace fused_attn::device
