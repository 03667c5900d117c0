"""The peers, a file a family. `PEERS` is the registration: a new one is one more name here."""

from . import (
    compiled,
    eager,
    flash_attn,
    flex,
    liger,
    onnx_runtime,
    quack,
    sdpa,
    torch_nn,
    xformers,
)
from .peer import MARK, Peer

__all__ = ["MARK", "PEERS", "Peer", "marked"]

PEERS: tuple[Peer, ...] = (
    *sdpa.PEERS,
    *flex.PEERS,
    *torch_nn.PEERS,
    *eager.PEERS,
    *compiled.PEERS,
    *flash_attn.PEERS,
    *xformers.PEERS,
    *liger.PEERS,
    *quack.PEERS,
    *onnx_runtime.PEERS,
)


def marked(name: str, operation: str) -> str:
    """The name of a side for a table, with `MARK` if it writes into memory made before."""
    reuses = any(peer.name == name and operation in peer.reuses_memory for peer in PEERS)
    return f"{name}{MARK}" if reuses else name
