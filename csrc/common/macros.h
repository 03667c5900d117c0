#pragma once

// Functions of files that are compiled once per instruction set must not leave a shared out-of-line
// copy behind: the linker would keep one of them for all levels. Forced inlining and the namespace
// of the level (see cpu/level.h) both prevent it.
#if defined(_MSC_VER)
#define FUSED_ATTN_INLINE __forceinline
#define FUSED_ATTN_NOINLINE __declspec(noinline)
#define FUSED_ATTN_UNROLL
#else
#define FUSED_ATTN_INLINE inline __attribute__((always_inline))
#define FUSED_ATTN_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define FUSED_ATTN_UNROLL _Pragma("unroll")
#else
#define FUSED_ATTN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace fused_attn {

// Asks for the cache line at an address, which may lie outside of what was allocated. kCache: the
// cache to bring it to, 1 for the first.
template <int kCache = 1>
FUSED_ATTN_INLINE void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 4 - kCache);
#else
  (void)address;
#endif
}

}  // namespace fused_attn
