"""One training step on a sequence that no rank holds whole: 128k tokens on four.

    python long_context.py
    torchrun --nproc-per-node 4 long_context.py

It prints loss, time, and by how much the memory of a rank grew.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import ranks
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "language_model"))

from model import LanguageModel

from fused_attn.integrations.distributed import context_parallel, counting, shard


def main(options: argparse.Namespace) -> None:
    """On every rank."""
    torch.manual_seed(0)
    device = ranks.device()
    model = LanguageModel(256, width=options.width, heads=1, layers=1, feed_forward=options.width)
    model.to(device)
    text = torch.randint(0, 256, (1, options.tokens + 1))
    how = {"order": "zigzag"}
    tokens, targets = (shard(x, **how).to(device) for x in (text[:, :-1], text[:, 1:]))
    before, start = _memory(), time.perf_counter()
    with counting() as sent, context_parallel(**how):
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
    for parameter in model.parameters():  # every rank has a share of the gradient of the mean
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    grown = torch.tensor(float(_memory() - before), device=device)
    dist.all_reduce(grown, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        print(
            f"{options.tokens} tokens on {dist.get_world_size()} ranks: "
            f"loss {mean.item() / dist.get_world_size():.6f}, gradient norm {norm.item():.6f}, "
            f"{time.perf_counter() - start:.1f} s, at most {grown.item() / 2**20:.0f} MiB more a "
            f"rank, {sum(sent.values()) / 2**20:.1f} MiB sent by one"
        )


def _memory() -> int:
    """The most bytes that this process ever had, or the GPU gave it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 1024)
    parser.add_argument("--ranks", type=int, default=4, help="where torchrun does not say")
    parser.add_argument("--width", type=int, default=16)
    given = parser.parse_args()
    ranks.run(main, given, given.ranks)
