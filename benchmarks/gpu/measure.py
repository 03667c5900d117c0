"""The measurements of `make gpu`, one subcommand each: suites on the GPU.

    python -m benchmarks.gpu.measure PART

Results go to FUSED_ATTN_RESULTS (default: this GPU's folder below `benchmarks/results/`), a CSV
file a suite. A part that is stopped has lost nothing but the case that it was at. Each suite has a
budget of seconds, so that a slow peer takes time from its own part alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from ..suites import ceilings as limits
from ..suites import cli, machine
from . import table

# Without the peers that keep every score, and those that compile for seconds a case.
ATTENTION_PEERS = (
    "sdpa-cudnn,sdpa-flash,sdpa-efficient,flash-attn-2,flash-attn-3,flash-attn-4,xformers"
)
# The lengths that tell most, largest head counts first: what the budget cuts off comes last.
FIELD = tuple(
    f"{16384 // length},{2048 // dim},{2048 // dim},{length},{length},{dim}"
    for dim in (128, 64, 256)
    for length in (2048, 8192, 512, 16384)
)


def folder() -> Path:
    given = os.environ.get("FUSED_ATTN_RESULTS")
    return Path(given) if given else machine.results_folder("cuda")


def suite(name: str, seconds: int, *options: str, into: str = "") -> None:
    """Run a suite on the GPU and record it, in the folder `into` of the results."""
    save = str(folder() / into)
    command = [name, "--device", "cuda", "--save", save, "--budget", str(seconds)]
    command += ["--passes", "1"]  # the time on a lent card is for more cases
    print(f"bench {' '.join([*command, *options])}", flush=True)
    cli.main([*command, *options])


def ceilings() -> None:
    """GEMM and copy, as the shares of the suites have them: every process measures its own."""
    found = {
        "gemm_tflops": round(limits.gemm_flops(torch.bfloat16, "cuda", 1) / 1e12, 1),
        "copy_gbs": round(limits.copy_bandwidth("cuda", 1) / 1e9, 1),
    }
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / "ceilings.json").write_text(json.dumps(found) + "\n")
    print(found)


def attention() -> None:
    peers = ("--peers", ATTENTION_PEERS, "--rounds", "15")
    suite("forward", 65, "--shapes", *FIELD, *peers)
    suite("backward", 75, "--shapes", *FIELD, *peers)


def deterministic() -> None:
    """The backward that torch's switch asks for, against our own default and not against peers."""
    shapes = [shape for shape in FIELD if ",8192,8192," in shape]
    torch.use_deterministic_algorithms(True, warn_only=True)
    suite("backward", 25, "--shapes", *shapes, "--peers", "none", into=table.DETERMINISTIC)


def norms() -> None:
    suite("layer_norm", 45, "--peers", "torch,liger,quack")
    suite("layer_norm", 10, "--shapes", "32768,4096,layer", "--peers", "torch,torch.compile")


def masks() -> None:
    shapes = [
        f"{size},{variant}"
        for size in ("4,16,16,2048,2048,64", "8,12,12,512,512,64")
        for variant in ("bias", "padding", "mask", "window", "alibi", "softcap")
    ]
    suite("masks", 30, "--shapes", *shapes, "--peers", ATTENTION_PEERS)
    suite("packed", 20, "--peers", ATTENTION_PEERS)
    compiled = ("2,16,16,4096,4096,128,bias", "2,16,16,4096,4096,128,padding")
    suite("masks", 25, "--shapes", *compiled, "--peers", f"{ATTENTION_PEERS},flex")


def decode() -> None:
    suite("decode", 30, "--peers", ATTENTION_PEERS)


def modules() -> None:
    suite("modules", 20, "--shapes", "32,512,768,12,layer")  # torch.compile takes most of it
    suite(
        "modules",
        30,
        "--shapes",
        "8,512,768,12,layer-padded",
        "32,512,512,8,layer",
        "8,512,768,12,mha",
        "8,512,768,12,encoder",
        "--peers",
        "torch.nn,torch.nn-fast",
    )
    suite("weights", 15, "--shapes", "8,512,768,12", "--peers", "torch.nn,torch.nn-fast")


def overhead() -> None:
    suite("overhead", 20)
    suite("forward", 30, "--shapes", "small", "--peers", ATTENTION_PEERS)


FUNCTIONS = (ceilings, attention, deterministic, norms, masks, decode, modules, overhead)
PARTS = {function.__name__: function for function in FUNCTIONS}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        raise SystemExit(f"usage: python -m benchmarks.gpu.measure {{{','.join(PARTS)}}}")
    torch.manual_seed(0)
    PARTS[sys.argv[1]]()
