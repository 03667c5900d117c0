"""The package in a fresh process: what importing it must not do, and what may be missing."""

from __future__ import annotations

import subprocess
import sys

PRELUDE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in BLOCKED or name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(code: str, *blocked: str) -> str:
    source = f"BLOCKED = {set(blocked)!r}\n{PRELUDE}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_runs_without_triton_and_without_the_compiled_part() -> None:
    output = run(
        """
import torch, fused_attn
q = torch.randn(1, 2, 8, 4, requires_grad=True)
fused_attn.attention(q, q, q, causal=True).sum().backward()
assert q.grad.isfinite().all()
print(fused_attn.last_backend())
print(fused_attn.explain(q, q, q))
""",
        "triton",
        "fused_attn._C",
    )
    assert output.startswith("reference")
    assert "fused_attn._C is not there" in output


def test_importing_loads_neither_triton_nor_the_compiled_part_nor_cuda() -> None:
    run("""
import torch
before = set(sys.modules)
import fused_attn
loaded = set(sys.modules) - before
assert not any(name.split(".")[0] == "triton" for name in loaded), loaded
assert "fused_attn._C" not in loaded
assert not any(name.startswith("benchmarks") for name in loaded), loaded
assert not torch.cuda.is_initialized()
""")


def test_importing_patches_nothing_of_torch() -> None:
    run("""
import torch
before = {name: value for name, value in vars(torch.nn.functional).items()}
modules = {name: value for name, value in vars(torch.nn).items()}
import fused_attn
assert all(vars(torch.nn.functional)[name] is value for name, value in before.items())
assert all(vars(torch.nn)[name] is value for name, value in modules.items())
""")


def test_every_public_name_exists_and_says_what_it_is() -> None:
    run("""
import fused_attn
for name in fused_attn.__all__:
    assert getattr(fused_attn, name).__doc__ or name.startswith("__"), name
""")


def test_what_messages_and_pages_name_needs_no_import_of_its_own() -> None:
    """`fused_attn.fx.symbolic_trace` and the doors, in a process that imports fused_attn alone."""
    run("""
import fused_attn
assert "fused_attn.fx" not in sys.modules
for name in ("fx.symbolic_trace", "testing.assert_parity", "functional.attention",
             "integrations.flash_attn.install", "integrations.torch_sdpa.activate"):
    found = fused_attn
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found), name
assert "fused_attn.integrations.transformers" not in sys.modules
assert not hasattr(fused_attn, "nonsense")
assert not hasattr(fused_attn.integrations, "nonsense")
""")
