// The vocabulary of the GPU kernels. Kernels hold no inline assembly and no pointer into shared
// memory: they say what they do in these words, which mean PTX under nvcc, and an emulated thread
// block on the CPU (emulator/) in tests. One source, proven where there is no GPU.
//
// Shared memory is addressed by 32-bit numbers. Names follow the PTX ISA where it has one.
#pragma once

#if defined(FUSED_ATTN_EMULATED)
#include "emulator/primitives.h"
#else
#include "cuda/ptx.h"
#endif
