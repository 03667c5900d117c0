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
from .peer import Peer

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
