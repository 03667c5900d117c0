"""Plans of torch.distributed.tensor.parallel that were written for torch.nn, on swapped models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fused_attn
from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo

N, L, E, H, FF = 2, 8, 16, 4, 32


class Block(nn.Module):
    """As models of today are written: projections of their own, torch's functions between."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(E), norm(E)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(E, FF), nn.Linear(FF, E)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, E // H)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        out = fused_attn.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(fused_attn.bias_activation(self.up(self.norm2(x)), activation="gelu"))


class Model(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, E)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.norm = norm(E)
        self.head = nn.Linear(E, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plan_of(local: bool) -> dict[str, Any]:
    """Tensor and sequence parallelism as torch's tutorial has it; `local`: plain tensors inside."""
    column: dict[str, Any] = {"use_local_output": local}
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(2):
        block = f"blocks.{i}"
        plan |= {
            f"{block}.norm1": SequenceParallel(),
            f"{block}.norm2": SequenceParallel(),
            f"{block}.wo": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            f"{block}.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            f"{block}.up": ColwiseParallel(input_layouts=Shard(1), **column),
            **{
                f"{block}.{w}": ColwiseParallel(input_layouts=Shard(1), **column)
                for w in ("wq", "wk", "wv")
            },
        }
    plan["embedding"] = RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    )
    return plan


def same_training(plain: nn.Module, sharded: nn.Module, *inputs: Tensor, local: Any = None) -> None:
    given = inputs if local is None else local
    expected, found = plain(*inputs), sharded(*given)
    found = found.full_tensor() if isinstance(found, DTensor) else found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    for (name, p), mine in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        grad = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        torch.testing.assert_close(
            grad, p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_sequence_parallel(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    tokens = torch.arange(N * L).reshape(N, L) % 11
    for norm in (nn.LayerNorm, nn.RMSNorm):
        for local in (False, True):
            torch.manual_seed(0)
            stock = Model(norm).double()
            fused = copy.deepcopy(stock)
            assert fused_attn.fuse(fused).swapped
            sharded = parallelize_module(copy.deepcopy(fused), mesh, plan_of(local))
            same_training(stock, sharded, tokens)


def check_encoder_layer(rank: int, size: int) -> None:
    """torch.nn's own layer: sequence parallel norms, the attention's input prepared."""
    mesh = init_device_mesh("cpu", (size,))
    plan = {
        "norm1": SequenceParallel(),
        "norm2": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1),) * 3,
            desired_input_layouts=(Replicate(),) * 3,
            use_local_output=True,
        ),
        "self_attn.out_proj": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        ),
        "linear1": ColwiseParallel(input_layouts=Shard(1)),
        "linear2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(
        E, H, FF, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ).double()
    fused = copy.deepcopy(stock)
    fused = nn.Sequential(fused)
    fused_attn.fuse(fused)
    layer = fused[0]
    assert isinstance(layer, fused_attn.FusedTransformerEncoderLayer)
    sharded = parallelize_module(layer, mesh, plan)
    x = torch.randn(N, L, E, dtype=torch.float64)
    same_training(stock, sharded, x, local=(distribute_tensor(x, mesh, [Shard(1)]),))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", [check_sequence_parallel, check_encoder_layer])
def test_a_plan_for_torch_nn_trains_as_one_process(check: Any, size: int) -> None:
    world(size).run(check, size)
