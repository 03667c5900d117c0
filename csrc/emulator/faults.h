#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fused_attn::emulator {

// Mistakes that the emulator must find, by name; "none" is the kernel without one.
std::vector<std::string> fault_names();

// Runs a small kernel with one mistake in it, under schedule `seed`. Returns what the machine
// reported; "wrong result" if it reported nothing and the numbers are wrong.
std::vector<std::string> run_fault(const std::string& name, uint64_t seed);

}  // namespace fused_attn::emulator
