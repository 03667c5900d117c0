"""GPU kernels where there is no GPU: Triton's in its interpreter, CUDA's on the emulated device.

Both are slow stand-ins on CPU tensors, which a backend takes when it is asked for by name only.
Import this before anything imports Triton or `fused_attn`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

# Of what takes long in Triton's interpreter and tells little that the other cases don't.
INTERPRETED_SHARE_OF_FUZZ = 20
INTERPRETED_SHARE_OF_FLOAT16 = 6  # whose kernels are float32's but for a conversion
SLOW_STAND_IN = re.compile(r"test_large_outputs_are_complete\[(cuda|triton)")
NOT_INTERPRETED = re.compile(
    r"test_opcheck\[(everything|weights|pre)|test_results_repeat_bit_for_bit\[.*everything"
    r"|test_agrees_with_the_oracle\[triton-(2|6|8|16|17) rows|test_agrees.*triton-above tile"
    r"|test_agrees_with_the_oracle\[triton-several passes"
    r"|test_nan_in_a_key_that_nobody_sees.*(float16|-inf-)|test_fullgraph_compile.*(True|packed)"
)


def arrange() -> None:
    """Let the backends find their stand-ins."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    built = f"build/cmake-{sys.implementation.cache_tag}-*/csrc/emulator/_emulator*.so"
    for emulator in sorted(ROOT.glob(built)):  # `make test` builds it
        os.environ.setdefault("FUSED_ATTN_EMULATOR", str(emulator))


def is_left_out(item: pytest.Item, interpreted: set[str]) -> bool:
    """Most random and float16 cases, and the largest others, of backends that are interpreted.

    `pytest --every` runs them too.
    """
    if item.config.getoption("every"):
        return False
    if item.get_closest_marker("every") is not None:
        return True
    if not torch.cuda.is_available() and SLOW_STAND_IN.match(item.name):
        return True
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if not interpreted.intersection(x for x in params.values() if isinstance(x, str)):
        return False
    seldom = params.get("fuzz_seed", 0) % INTERPRETED_SHARE_OF_FUZZ != 0
    if params.get("dtype") == torch.float16:
        seldom |= zlib.crc32(item.name.encode()) % INTERPRETED_SHARE_OF_FLOAT16 != 0
    return seldom or NOT_INTERPRETED.match(item.name) is not None


def import_kernels() -> None:
    """Now, while the variable is set: it decides at a kernel's import what the kernel is.

    Tests that pretend to a GPU unset it, and may be the first of their process.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        import triton  # noqa: F401
    except Exception:  # no Triton, or one that fails to import: there are no kernels
        return
    from fused_attn.ops.operations import OPERATIONS

    for operation in OPERATIONS:
        package = f"{operation.package.__name__}.triton"
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(f"{package}.launch")


def make_interpreter_faster() -> None:
    """Triton's interpreter patches its language anew in every call of a helper; once will do."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except Exception:  # no Triton, or one that fails to import: nothing to make faster
        return
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, core = interpreter._patch_lang, interpreter.tl.core
    scopes: dict[bool, Any] = {}

    class Whole:
        """The scopes of one launch, undone together when it ends."""

        def restore(self) -> None:
            while scopes:
                scopes.popitem()[1].restore()

    def patch_once(function: Any) -> Any:
        through_core = any(value is core for value in function.__globals__.values())
        if through_core not in scopes:
            scopes[through_core] = patch(function)
        return Whole()

    interpreter._patch_lang = patch_once
