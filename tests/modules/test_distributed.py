"""Our layers sharded by FSDP2, tensor parallelism and DDP: two gloo processes on the CPU."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fused_attn import FusedTransformerEncoderLayer

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)

N, L, E, H, FF = 4, 5, 16, 4, 32


def layer() -> FusedTransformerEncoderLayer:
    torch.manual_seed(0)
    return FusedTransformerEncoderLayer(E, H, FF, dropout=0.0, batch_first=True, activation="gelu")


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(sharded: nn.Module, plain: nn.Module, rank: int, split: bool) -> None:
    """One step on the whole batch, or on each rank's half of it, gives the same gradients."""
    torch.manual_seed(1)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([L, 3, 2, 4])[:, None]
    half = slice(rank * N // 2, (rank + 1) * N // 2) if split else slice(None)
    out = sharded(x[half], src_key_padding_mask=padding[half])
    real = ~padding[half]
    expected = plain(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[real], expected[half][real])
    # The mean over ranks of the sums over halves is half the sum.
    out[real].sin().sum().backward()
    (expected[~padding].sin().sum() / (2 if split else 1)).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in sharded.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(full(grads[name]), parameter.grad, msg=lambda m, n=name: n + m)


def run_ddp(rank: int) -> None:
    plain = layer()
    check(nn.parallel.DistributedDataParallel(copy.deepcopy(plain)), plain, rank, split=True)


def run_fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    # The whole layer; single parts of it, out_proj alone among them (torch.nn cannot do that one).
    for names in ([""], ["self_attn.out_proj", ""], ["self_attn", "linear1", "norm1", ""]):
        plain = layer()
        sharded = copy.deepcopy(plain)
        for name in names:
            fully_shard(sharded.get_submodule(name), mesh=mesh)
        check(sharded, plain, rank, split=True)


def run_tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plain = layer()
    plan = {
        "linear1": ColwiseParallel(),
        "linear2": RowwiseParallel(),
        "self_attn.out_proj": RowwiseParallel(input_layouts=Replicate()),
    }
    sharded = parallelize_module(copy.deepcopy(plain), init_device_mesh("cpu", (2,)), plan)
    check(sharded, plain, rank, split=False)


def _worker(rank: int, port: int, run: Callable[[int], None]) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    run(rank)
    dist.barrier()  # a rank that leaves early breaks the other's connection
    # Not the ordinary way out: now and then torch's own threads abort the interpreter's teardown
    # ("terminate called without an active exception"), when all that is tested here is over. An
    # exception above never gets here.
    os._exit(0)


@pytest.mark.parametrize("run", [run_ddp, run_fsdp, run_tensor_parallel])
def test_two_processes_train_as_one(run: Callable[[int], None]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, args=(port, run), nprocs=2)
