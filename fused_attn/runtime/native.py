"""Loads the compiled part of the package, ``fused_attn._C``, once, when it is first asked for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# First: `_C` then shares torch's copy of libgomp, and with it one pool of threads.
import torch

from .._version import __version__


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    name = f"{__package__.partition('.')[0]}._C"
    try:
        module = importlib.import_module(name)
        built = module.build_info()["version"]
        if built.partition("+")[0] != __version__:  # behind it what `make sanitize` calls its own
            return None, (
                f"{name} was built for fused_attn {built}, and this is {__version__}: "
                "install or build again"
            )
        return module, None
    except ModuleNotFoundError as error:
        if error.name != name:
            return None, f"{name} failed to load: {error}"
        return None, (
            f"{name} is not there: the package was installed without its compiled part, on purpose "
            "(FUSED_ATTN_NATIVE=off) or because no C++ compiler was found; "
            "reinstall with FUSED_ATTN_NATIVE=on to see which"
        )
    except Exception as error:
        return None, f"{name} failed to load: {error}"


def why_not() -> str | None:
    """Why the compiled module cannot be used; None if it can."""
    return _load()[1]


# The compiler cannot trace an import. This is torch.compiler.assume_constant_result(why_not)
# spelled out: calling that would load the compiler, and with it Triton.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_on(device: torch.device) -> list[str]:
    """Reasons why no C++ kernel can run on tensors on `device`."""
    reasons = []
    if device.type != "cpu":
        reasons.append(f"needs tensors on the CPU, these are on {device}")
    missing = why_not()
    if missing is not None:
        reasons.append(missing)
    return reasons


def level() -> str:
    """The instruction-set level whose kernels run on the CPU, in words."""
    return f"level {module().cpu_level()}"


@functools.cache
def module() -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason where there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded
