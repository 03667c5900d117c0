#pragma once

#include <pybind11/pybind11.h>

namespace fused_attn::embedding {

// embedding_forward(tokens, weight, table, positions, rng, y, scale, offset, padding_idx,
// dropout_p, threads) and embedding_backward(tokens, weight, table, positions, rng, dy, dweight,
// dtable, scale, offset, padding_idx, dropout_p, threads): tensors or None; tokens and positions
// contiguous, any strides otherwise. IndexError for a token or position out of range. See params.h.
void bind(pybind11::module_& m);

}  // namespace fused_attn::embedding
