"""The measurements of `make gpu`, a function each (`parts.py` names them): suites on the GPU.

Results go to FUSED_ATTN_RESULTS (default: this GPU's folder below `benchmarks/results/`), a CSV
file a suite. A part that is stopped has lost nothing but the case that it was at. Each suite has a
budget of seconds, so that a slow peer takes time from its own part alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.utils.deterministic

import fused_attn
from fused_attn.runtime import user_files
from fused_attn.runtime.triton import device as triton_device

from ..suites import ceilings as limits
from ..suites import cli, machine
from . import table

BACKENDS = table.BACKENDS  # of ours
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
    command += ["--backends", ",".join(BACKENDS)]
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


def attention_8k() -> None:
    """What the table shows: head sizes 64 and 128 at 8192 keys, FlexAttention among the peers."""
    shapes = [shape for shape in FIELD if ",8192,8192," in shape and not shape.endswith(",256")]
    peers = ("--peers", f"{ATTENTION_PEERS},flex", "--rounds", "15")
    suite("forward", 50, "--shapes", *shapes, *peers)
    suite("backward", 60, "--shapes", *shapes, *peers)


def attention() -> None:
    shapes = [shape for shape in FIELD if ",8192,8192," not in shape or shape.endswith(",256")]
    peers = ("--peers", ATTENTION_PEERS, "--rounds", "15")
    suite("forward", 27, "--shapes", *shapes, *peers)
    suite("backward", 30, "--shapes", *shapes, *peers)


def deterministic() -> None:
    """The backward that torch's switch asks for beside our default, and not against peers."""
    shapes = [shape for shape in FIELD if ",8192,8192," in shape]
    suite("backward", 15, "--shapes", *shapes, "--peers", "none")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor is filled first, and the filling is timed with the rest.
    torch.utils.deterministic.fill_uninitialized_memory = False
    suite("backward", 18, "--shapes", *shapes, "--peers", "none", into=table.DETERMINISTIC)


def tuning() -> None:
    """Which of Triton's tiles are fastest here, by class of calls; and the file that says so."""
    for head_dim in (128, 64, 256):
        for causal in (True, False):
            q = torch.randn(1, 16, 8192, head_dim, device="cuda", dtype=torch.bfloat16)
            q.requires_grad_()
            found = fused_attn.autotune(q, q, q, causal=causal, backend="triton")
            for name, trial in found.items():
                print(f"head size {head_dim}, {name}: {trial}", flush=True)
    path = user_files.folder() / triton_device.machine(q.device).file_name()
    if path.exists():
        (folder() / path.name).write_text(path.read_text())


def norms() -> None:
    suite("layer_norm", 30, "--peers", "torch,liger,quack")
    suite("layer_norm", 8, "--shapes", "32768,4096,layer", "--peers", "torch,torch.compile")


def masks() -> None:
    shapes = [
        f"{size},{variant}"
        for size in ("4,16,16,2048,2048,64", "8,12,12,512,512,64")
        for variant in ("bias", "padding", "mask", "window", "alibi", "softcap")
    ]
    suite("masks", 15, "--shapes", *shapes, "--peers", ATTENTION_PEERS)
    suite("packed", 8, "--peers", ATTENTION_PEERS)
    compiled = ("2,16,16,4096,4096,128,bias", "2,16,16,4096,4096,128,padding")
    suite("masks", 15, "--shapes", *compiled, "--peers", f"{ATTENTION_PEERS},flex")


def decode() -> None:
    suite("decode", 20, "--peers", ATTENTION_PEERS)


def modules() -> None:
    sizes = ("8,512,768,12,layer-padded", "32,512,512,8,layer", "8,512,768,12,mha",
             "8,512,768,12,encoder")  # fmt: skip
    plain = ("--peers", "torch.nn,torch.nn-fast")
    suite("modules", 15, "--shapes", *sizes, *plain)
    suite("weights", 5, "--shapes", "8,512,768,12", *plain)
    suite("modules", 12, "--shapes", "32,512,768,12,layer")  # torch.compile takes most of it


def overhead() -> None:
    """Host time, and calls replayed by CUDA graphs."""
    suite("overhead", 12)
    suite("forward", 25, "--shapes", "small", "--peers", ATTENTION_PEERS)
