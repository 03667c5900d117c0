// A program of levels.cmake: its exit status is how many of x86's levels this machine has.
#define FUSED_ATTN_LEVEL_FAMILY x86
#include "cpu/levels.h"
#include "cpu/processor_features.h"

#define FUSED_ATTN_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#define FUSED_ATTN_RUNS(level, ...) FUSED_ATTN_OF_LEVEL(PROCESSOR, level),

using fused_attn::has_f16c;
using fused_attn::tiles_permitted;

int main() {
  const bool runs[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_RUNS) false};
  int count = 0;
  while (runs[count]) ++count;
  return count;
}
