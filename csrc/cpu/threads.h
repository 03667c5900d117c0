// How many threads a call may use.
#pragma once

#include <cstdint>

namespace fused_attn {

// `wanted`, kept within reason; 1 in a forked child, whose copy of the parent's pool has no
// threads: OpenMP would wait for them for ever.
int usable_threads(int64_t wanted);

}  // namespace fused_attn
