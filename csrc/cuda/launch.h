// Host side of a launch: tensor maps, the stream, and a kernel started on it.
#pragma once

#if defined(FUSED_ATTN_EMULATED)
#include "emulator/launch.h"
#else
#include "cuda/launch_cuda.h"
#endif
