"""What the processor is and can do that torch's own CPU kernels use."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from . import native


@functools.cache
def vendor() -> str:
    """Who made it: "amd", "intel", or "" for any other and where there is no compiled part."""
    return native.module().cpu_vendor() if native.why_not() is None else ""


@functools.cache
def name() -> str:
    """Its maker's name for it, with the numbers of its kind where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in told.items()}
    wanted = (facts.get(key, "") for key in ("model name", "cpu family", "model"))
    return " ".join(word for word in wanted if word) or platform.machine()


@functools.cache
def has(*features: str) -> bool:
    """True if it has any of `features`, by torch's names for them ("amx_tile", "avx512_bf16")."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:  # torch before 2.11
        return any(bool(getattr(torch.cpu, f"_is_{x}_supported", bool)()) for x in features)
    known = ask()
    return any(bool(known.get(feature, False)) for feature in features)


@functools.cache
def our_tiles() -> bool:
    """Whether our kernels of bfloat16 use its instructions for tiles (AMX)."""
    return native.why_not() is None and native.module().cpu_multiplies_tiles()


# Compilers cannot trace what these ask. This is torch.compiler.assume_constant_result spelled out.
setattr(vendor, "_dynamo_marked_constant", True)  # noqa: B010
setattr(has, "_dynamo_marked_constant", True)  # noqa: B010
setattr(our_tiles, "_dynamo_marked_constant", True)  # noqa: B010
