"""The functions, in one place: `import fused_attn.functional as F`, as with torch."""

from .flex.api import flex_attention
from .ops.attention.api import (
    attention,
    attention_backends,
    attention_varlen,
    merge_attention,
)
from .ops.attention.backward import AttentionGradients, attention_backward
from .ops.attention.sdpa import scaled_dot_product_attention
from .ops.bias_activation.api import bias_activation
from .ops.embedding.api import embedding
from .ops.explain import explain, last_backend
from .ops.layer_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.linear.api import linear

__all__ = [
    "AttentionGradients",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_backends",
    "attention_backward",
    "attention_varlen",
    "bias_activation",
    "embedding",
    "explain",
    "flex_attention",
    "last_backend",
    "layer_norm",
    "linear",
    "merge_attention",
    "rms_norm",
    "scaled_dot_product_attention",
]
