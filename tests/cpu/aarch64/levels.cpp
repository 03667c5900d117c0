// Prints the levels that this processor can run, lowest first.
#include <cstdio>

#include "cpu/level.h"

int main() {
  for (const auto& name : fused_attn::available_levels()) std::printf("%s\n", name.c_str());
}
