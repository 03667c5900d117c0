#include "attention/sm90/dkdv_launch.h"

namespace fused_attn::attention {

template void launch_dkdv<device::BFloat16, true>(const BackwardParams&, const BackwardProblem&,
                                                  device::Stream);

}  // namespace fused_attn::attention
