"""torch's own functions, one after the other; buffers reused in a forward, as on our side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operations.bias_activation import BiasActivation
from ..operations.embedding import Embedding
from ..operations.layer_norm import EPS, AddNorm
from ..operations.linear import Linear
from ..problem import Prepared, leaves
from .peer import Peer


def _add_norm(problem: AddNorm, tensors: dict[str, Tensor]) -> Prepared:
    if problem.wants_gradient or problem.rms:  # torch's RMSNorm writes to no buffer of ours
        return Prepared(lambda: problem.formula(**tensors), leaves(problem, tensors))
    x, residual, weight, bias = tensors.values()
    y, h = torch.empty_like(x), torch.empty_like(x)
    statistics = torch.float32 if x.device.type == "cuda" else x.dtype
    mean, rstd = (x.new_empty(problem.rows, 1, dtype=statistics) for _ in range(2))

    def forward() -> tuple[Tensor, Tensor]:
        torch.add(x, residual, out=h)
        torch.ops.aten.native_layer_norm.out(
            h, (problem.width,), weight, bias, EPS, out0=y, out1=mean, out2=rstd
        )
        return y, h

    return Prepared(forward)


def _bias_activation(problem: BiasActivation, tensors: dict[str, Tensor]) -> Prepared:
    if problem.wants_gradient:
        return Prepared(lambda: problem.formula(**tensors), leaves(problem, tensors))
    x, bias = tensors.values()
    h, y = torch.empty_like(x), problem.empty_result()

    def forward() -> Tensor:
        torch.add(x, bias, out=h)
        if not problem.gated:
            return torch.ops.aten.gelu.out(h, out=y)
        gate, up = h.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=y)
        return torch.mul(y, up, out=y)

    return Prepared(forward)


def _embedding(problem: Embedding, tensors: dict[str, Tensor]) -> Prepared:
    tokens, weight, table = tensors.values()
    return Prepared(
        lambda: F.embedding(tokens, weight) * problem.scale + table, leaves(problem, tensors)
    )


def _linear(problem: Linear, tensors: dict[str, Tensor]) -> Prepared:
    x, weight, bias = tensors.values()
    return Prepared(lambda: F.linear(x, weight, bias), leaves(problem, tensors))


PEERS = (
    Peer(
        "torch",
        {
            "add_norm": _add_norm,
            "bias_activation": _bias_activation,
            "embedding": _embedding,
            "linear": _linear,
        },
    ),
)
