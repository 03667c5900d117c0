"""FSDP2, tensor parallelism and context parallelism at once, on the small language model.

    python train.py --cp 2 --tp 2
    torchrun --nproc-per-node 8 train.py --dp 2 --cp 2 --tp 2 --save checkpoint
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        train.py --dp 2 --cp 2 --tp 2

Parameters are cut up over dp x cp by FSDP2 and over tp by torch's plans, the batch over dp, the
sequence over cp. The losses are those of one process (`--dp 1 --cp 1 --tp 1`).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.append(str(Path(__file__).parents[1] / "language_model"))

from model import LanguageModel

from fused_attn.integrations.distributed import context_parallel, shard

BATCH, LENGTH = 4, 32


def new_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The same on every rank, and on one process."""
    torch.manual_seed(0)
    return LanguageModel(256, width=32, heads=4, layers=2, feed_forward=64).to(dtype)


def distribute(model: LanguageModel, mesh: DeviceMesh) -> LanguageModel:
    """Cut up by torch's plans over `tp`, then by FSDP2 over `dp_cp`."""
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.stack.layers)):
        layer = f"stack.layers.{i}"
        plan |= {
            f"{layer}.self_attn.out_proj": RowwiseParallel(input_layouts=Replicate()),
            f"{layer}.linear1": ColwiseParallel(),
            f"{layer}.linear2": RowwiseParallel(),
        }
    if mesh["tp"].size() > 1:
        parallelize_module(model, mesh["tp"], plan)
    for part in (*model.stack.layers, model):
        fully_shard(part, mesh=mesh["dp_cp"])
    return model


def new_mesh(dp: int, cp: int, tp: int) -> DeviceMesh:
    """dp x cp x tp, with dp and cp together as `dp_cp`."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (dp, cp, tp), mesh_dim_names=("dp", "cp", "tp"))
    mesh["dp", "cp"]._flatten("dp_cp")
    return mesh


def train(model: nn.Module, text: Tensor, steps: int, mesh: DeviceMesh | None) -> list[float]:
    """Losses of `steps` steps, of the whole batch; mesh None: on this process alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)  # all ranks draw the same batches
    device, losses = next(model.parameters()).device, []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH, 1), generator=draw)
        pieces = text[starts + torch.arange(LENGTH + 1)]
        inputs, targets = pieces[:, :-1], pieces[:, 1:]
        spread: Any = contextlib.nullcontext()
        if mesh is not None:
            mine = slice(mesh["dp"].get_local_rank(), None, mesh["dp"].size())
            parts = (shard(x[mine], mesh["cp"], order="zigzag") for x in (inputs, targets))
            inputs, targets = parts
            spread = context_parallel(mesh["cp"], order="zigzag")
        with spread:
            logits = model(inputs.to(device))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if mesh is not None:
            dist.all_reduce(total, group=mesh["dp_cp"].get_group())
            total /= mesh["dp_cp"].size()
        losses.append(total.item())
    return losses


def save(model: nn.Module, folder: str) -> None:
    """A checkpoint that any number of processes can load, with torch.nn's names."""
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def load(model: nn.Module, folder: str) -> None:
    """Into a model of torch.nn or of fused_attn, on one process without a process group."""
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])


def main(options: argparse.Namespace) -> None:
    """On every rank."""
    mesh = new_mesh(options.dp, options.cp, options.tp)
    model = distribute(new_model().to(ranks.device()), mesh)
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    losses = train(model, text, options.steps, mesh)
    if options.save:
        save(model, options.save)
    if dist.get_rank() == 0:
        print(f"dp {options.dp}, cp {options.cp}, tp {options.tp}:", *(f"{x:.5f}" for x in losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dp", "cp", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", help="folder of a checkpoint")
    given = parser.parse_args()
    ranks.run(main, given, given.dp * given.cp * given.tp)
