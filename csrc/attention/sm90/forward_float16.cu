#include "attention/sm90/forward_launch.h"

namespace fused_attn::attention {

template void launch_forward<device::Float16>(const Params&, const DeviceProblem&, device::Stream);

}  // namespace fused_attn::attention
