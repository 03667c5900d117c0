#include "common/peak.h"

#include "common/cpu_level.h"
#include "common/peak_kernel.h"

namespace fused_attn {
namespace {

using Run = double (*)(DType, int64_t);

constexpr Run kRuns[] = {
    portable::multiply_adds,
#if defined(FUSED_ATTN_X86_LEVELS)
    avx2::multiply_adds,
    avx512::multiply_adds,
    avx512_bf16::multiply_adds,
#endif
};

}  // namespace

double multiply_adds(DType dtype, int64_t repeats) {
  return kRuns[static_cast<int>(kernel_level(dtype))](dtype, repeats);
}

}  // namespace fused_attn
