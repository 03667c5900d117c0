// Tensor maps that were encoded before: the driver takes longer for one than a launch can spare.
#pragma once

#include "cuda/launch.h"

namespace fused_attn::device {

// make_tensor_map(request), or what it gave for an equal request. A map holds an address and a
// geometry and nothing else: it stays right when memory is freed and given to another tensor, of
// any 16-bit type, and addresses of different devices differ. Any thread may call.
TensorMap cached_tensor_map(const MapRequest& request);

// How many maps the calls of this process have encoded so far.
int64_t encoded_tensor_maps();

}  // namespace fused_attn::device
