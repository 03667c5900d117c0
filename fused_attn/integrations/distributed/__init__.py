"""More than one machine, with torch.distributed as the engine (docs/distributed.md).

    from fused_attn.integrations import distributed

    out = distributed.ring_attention(q, k, v, group, causal=True)  # parts of a sequence
    with distributed.context_parallel(mesh["cp"]):  # every attention of a model
        model(distributed.shard(tokens, mesh["cp"]))

DTensors need nothing: their rules are loaded with the first one, or by `register()`.
"""

from .communication import counting
from .context import context_parallel
from .dtensors import register
from .layouts import positions, shard, unshard
from .ring import ring_attention
from .ulysses import ulysses_attention
from .volume import bytes_sent

__all__ = [
    "bytes_sent",
    "context_parallel",
    "counting",
    "positions",
    "register",
    "ring_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]
