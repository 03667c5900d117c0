// What each instruction-set level that is compiled in needs a line for: FUSED_ATTN_EVERY_LEVEL(X)
// is X(portable) X(avx2) ... in the order of CpuLevel.
#pragma once

#if defined(FUSED_ATTN_X86_LEVELS)
#define FUSED_ATTN_EVERY_LEVEL(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define FUSED_ATTN_EVERY_LEVEL(X) X(portable)
#endif
