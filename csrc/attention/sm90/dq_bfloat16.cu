#include "attention/sm90/dq_launch.h"

namespace fused_attn::attention {

template void launch_delta<device::BFloat16>(const Params&, const BackwardProblem&, device::Stream);
template void launch_dq<device::BFloat16>(const BackwardParams&, const BackwardProblem&,
                                          device::Stream);

}  // namespace fused_attn::attention
