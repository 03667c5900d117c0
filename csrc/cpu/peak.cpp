#include "cpu/peak.h"

#include "cpu/level.h"
#include "cpu/peak_kernel.h"

namespace fused_attn {
namespace {

using Run = double (*)(DType, int64_t);

#define FUSED_ATTN_RUN(level, ...) level::multiply_adds,
constexpr Run kRuns[] = {FUSED_ATTN_EVERY_LEVEL(FUSED_ATTN_RUN)};

}  // namespace

double multiply_adds(DType dtype, int64_t repeats) {
  return kRuns[static_cast<int>(kernel_level(dtype))](dtype, repeats);
}

}  // namespace fused_attn
