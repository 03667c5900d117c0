"""Small modules and batches, and one call in each mode: for the tests of torch.nn's contract."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention, FusedTransformer

N, S, L, E, H, FF = 3, 7, 5, 16, 4, 24
MODES = ["train", "eval", "no_grad", "inference_mode", "compiled"]


def transformer(**settings) -> FusedTransformer:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, **settings}
    return FusedTransformer(E, H, 2, 2, FF, **settings)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, S, E, dtype=dtype), torch.randn(N, L, E, dtype=dtype)


def attention(**settings) -> FusedMultiheadAttention:
    torch.manual_seed(0)
    return FusedMultiheadAttention(E, H, batch_first=True, **settings)


def in_mode(module: nn.Module, mode: str, *args: Tensor, **kwargs: object) -> object:
    module.train(mode != "eval")
    if mode == "compiled":
        torch._dynamo.reset()
        return torch.compile(module, backend="eager", fullgraph=True)(*args, **kwargs)
    if mode == "no_grad":
        with torch.no_grad():
            return module.eval()(*args, **kwargs)
    if mode == "inference_mode":
        with torch.inference_mode():
            return module.eval()(*args, **kwargs)
    return module(*args, **kwargs)
