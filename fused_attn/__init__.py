"""Fused attention for PyTorch: drop-in modules and the functions behind them."""

import importlib as _importlib
from types import ModuleType as _ModuleType

from ._version import __version__
from .convert import fuse, unfuse
from .flex.api import flex_attention
from .generation import DecoderOnly, Seq2SeqTransformer, beam_search, greedy_search, sample
from .modules import (
    FusedAddLayerNorm,
    FusedAddRMSNorm,
    FusedFeedForward,
    FusedLayerNorm,
    FusedLinear,
    FusedMultiheadAttention,
    FusedRMSNorm,
    FusedTransformer,
    FusedTransformerDecoder,
    FusedTransformerDecoderLayer,
    FusedTransformerEmbedding,
    FusedTransformerEncoder,
    FusedTransformerEncoderLayer,
    KeyValueCache,
    LayerCache,
    LearnedPositionalEncoding,
    MemoryCache,
    PagedKeyValueCache,
    SinusoidalPositionalEncoding,
    TransformerEmbedding,
)
from .ops.attention.api import (
    attention,
    attention_backends,
    attention_varlen,
    merge_attention,
)
from .ops.attention.backward import AttentionGradients, attention_backward
from .ops.attention.sdpa import scaled_dot_product_attention
from .ops.bias_activation.api import bias_activation
from .ops.dispatch import UnsupportedError
from .ops.embedding.api import embedding
from .ops.explain import explain, last_backend
from .ops.layer_norm.api import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .ops.linear.api import linear
from .prepare import autotune, autotuning, warmup
from .runtime.debug import debug

__all__ = [
    "AttentionGradients",
    "DecoderOnly",
    "FusedAddLayerNorm",
    "FusedAddRMSNorm",
    "FusedFeedForward",
    "FusedLayerNorm",
    "FusedLinear",
    "FusedMultiheadAttention",
    "FusedRMSNorm",
    "FusedTransformer",
    "FusedTransformerDecoder",
    "FusedTransformerDecoderLayer",
    "FusedTransformerEmbedding",
    "FusedTransformerEncoder",
    "FusedTransformerEncoderLayer",
    "KeyValueCache",
    "LayerCache",
    "LearnedPositionalEncoding",
    "MemoryCache",
    "PagedKeyValueCache",
    "Seq2SeqTransformer",
    "SinusoidalPositionalEncoding",
    "TransformerEmbedding",
    "UnsupportedError",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_backends",
    "attention_backward",
    "attention_varlen",
    "autotune",
    "autotuning",
    "beam_search",
    "bias_activation",
    "debug",
    "embedding",
    "explain",
    "flex_attention",
    "fuse",
    "greedy_search",
    "last_backend",
    "layer_norm",
    "linear",
    "merge_attention",
    "rms_norm",
    "sample",
    "scaled_dot_product_attention",
    "unfuse",
    "warmup",
]

# Named by messages and pages, and imported when somebody asks: `fused_attn.fx.symbolic_trace`.
_LAZY = ("functional", "fx", "integrations", "testing")


def __getattr__(name: str) -> _ModuleType:
    if name in _LAZY:
        return _importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
