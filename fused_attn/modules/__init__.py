"""Drop-ins for torch.nn's modules: subclasses with the same constructor and state_dict."""

from torch import nn

from .attention import FusedMultiheadAttention
from .cache import KeyValueCache, LayerCache, MemoryCache
from .decoder_layer import FusedTransformerDecoderLayer
from .embedding import FusedTransformerEmbedding, TransformerEmbedding
from .encoder_layer import FusedTransformerEncoderLayer
from .feed_forward import FusedFeedForward
from .layer_norm import FusedAddLayerNorm, FusedAddRMSNorm, FusedLayerNorm, FusedRMSNorm
from .linear import FusedLinear
from .paged_cache import PagedKeyValueCache
from .positions import LearnedPositionalEncoding, SinusoidalPositionalEncoding
from .stacks import FusedTransformer, FusedTransformerDecoder, FusedTransformerEncoder

# What `fuse` puts in the place of what. The classes are taken now: a program may later put other
# ones under torch.nn's names.
DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: FusedMultiheadAttention,
    nn.LayerNorm: FusedLayerNorm,
    nn.RMSNorm: FusedRMSNorm,
    nn.TransformerEncoderLayer: FusedTransformerEncoderLayer,
    nn.TransformerDecoderLayer: FusedTransformerDecoderLayer,
    nn.TransformerEncoder: FusedTransformerEncoder,
    nn.TransformerDecoder: FusedTransformerDecoder,
    nn.Transformer: FusedTransformer,
}
# The same for `fuse(model, linears=True)` alone.
LINEAR_DROP_INS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear}

__all__ = [
    "DROP_INS",
    "LINEAR_DROP_INS",
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
    "SinusoidalPositionalEncoding",
    "TransformerEmbedding",
]
