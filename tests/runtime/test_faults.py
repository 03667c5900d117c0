"""What goes wrong around a call: right results or a clear error, and the next call is right.

docs/testing.md lists every kind of fault with its test; those that need a place of their own
(forks, streams, ranks) stand there.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn.runtime import native
from tests.cases.fresh_process import run

compiled = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")

# The weights of a million keys take 256 MiB of scratch for each thread, which is more than is left.
OUT_OF_MEMORY = """
import resource, torch, fused_attn
from fused_attn.runtime import native
native.module()
torch.set_num_threads(3)
q, k = torch.randn(3, 4, 17, 8), torch.randn(3, 4, 3000, 8)
expected = fused_attn.attention(q, k, k, return_weights="per_head")
long = torch.randn(1, 1, 1 << 20, 8).expand(3, 4, -1, -1)
results = 3 * 17 * 4 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for threads in (1, 3):
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (used + results + (150 << 20), resource.RLIM_INFINITY))
    try:
        fused_attn.attention(q, long, long, return_weights="average", backend="cpu")
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, str(error)[:60])
    else:
        print("there was enough memory")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.set_num_threads(3)
found = fused_attn.attention(q, k, k, return_weights="per_head")
print(all(torch.equal(a, b) for a, b in zip(found, expected)))
"""


@compiled
@on_linux
def test_memory_that_is_refused_is_an_error_in_every_thread() -> None:
    """The kernels' scratch, not a tensor: what a task throws must not end the process."""
    *errors, after = run(OUT_OF_MEMORY).splitlines()
    assert [line.split()[0] for line in errors] == ["MemoryError", "MemoryError"]
    assert after == "True"


def results(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])]


class Fault(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "pre", "full_backward", "tensor"])
def test_an_exception_in_a_hook_comes_out_and_leaves_nothing(where: str) -> None:
    layer = fused_attn.FusedTransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = results(layer, x)

    def fail(*given: object) -> None:
        raise Fault

    if where == "tensor":
        handle = layer.self_attn.in_proj_weight.register_hook(fail)
    else:
        child = layer.self_attn.out_proj
        register = {
            "forward": child.register_forward_hook,
            "pre": layer.norm2.register_forward_pre_hook,
            "full_backward": child.register_full_backward_hook,
        }[where]
        handle = register(fail)
    with pytest.raises(Fault):
        results(layer, x)
    handle.remove()
    for found, right in zip(results(layer, x), expected, strict=True):
        assert torch.equal(found, right)


@compiled
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts")
def test_an_interrupt_in_a_long_kernel_is_heard_after_it(one_thread: None) -> None:
    q = torch.randn(1, 1, 700, 64)
    expected = fused_attn.attention(q, q, q, backend="cpu")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def many() -> None:
        for _ in range(10_000):
            fused_attn.attention(q, q, q, backend="cpu")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            many()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(fused_attn.attention(q, q, q, backend="cpu"), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_flushed_denormals_change_nothing_of_size_and_stay_as_they_are(
    threads: int, attention_backend: str
) -> None:
    """torch sets the flag for the calling thread alone: the others' share must not tell."""
    q, k, v = (torch.randn(1, 4, 33, 16) for _ in range(3))
    tiny = v * 1e-39  # denormal
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor has no such flag")
    number = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        flushed = [fused_attn.attention(q, k, x, backend=attention_backend) for x in (v, tiny)]
        still = torch.tensor([1e-39]) * 1.0
        torch.set_flush_denormal(False)
        plain = [fused_attn.attention(q, k, x, backend=attention_backend) for x in (v, tiny)]
        again = torch.tensor([1e-39]) * 1.0
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(number)
    assert float(still) == 0.0
    assert float(again) > 0.0
    assert (flushed[0] - plain[0]).abs().max() <= 4 * torch.finfo(torch.float32).eps
    for found in (flushed[1], plain[1]):
        assert found.abs().max() < torch.finfo(torch.float32).tiny


STUBS = {
    "mismatched": ("_C.py", "def build_info(): return {'version': '0.0.1'}",
                   "was built for fused_attn 0.0.1, and this is"),
    "too old to say": ("_C.py", "", "failed to load: module 'fused_attn._C' has no attribute"),
    "cut off": ("_C{suffix}", "\x7fELF and no more", "failed to load:"),
}  # fmt: skip


@pytest.mark.parametrize("name", STUBS)
def test_a_compiled_part_that_does_not_fit_is_said_and_not_used(name: str, tmp_path: Path) -> None:
    file, text, words = STUBS[name]
    package = tmp_path / "fused_attn"
    shutil.copytree(
        Path(fused_attn.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("_C.*", "__pycache__"),
    )
    (package / file.format(suffix=sysconfig.get_config_var("EXT_SUFFIX"))).write_text(text)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, fused_attn\n"
        "from fused_attn.runtime import native\n"
        "q = torch.randn(1, 2, 5, 4)\n"
        "fused_attn.attention(q, q, q)\n"
        "print(fused_attn.last_backend(), fused_attn.__file__, native.why_not())"
    )
    said = run(code)
    assert said.startswith("reference")
    assert str(tmp_path) in said
    assert words in said


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fused_attn.runtime import user_files
sys.path.insert(0, "examples/translate")
import checkpoint

folder = Path(sys.argv[1])
user_files.write(folder / "record.json", "old")
checkpoint.save(folder / "last.pt", {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for write in (
    lambda: user_files.write(folder / "record.json", "x" * 5000),
    lambda: checkpoint.save(folder / "last.pt", {"step": 2, "model": torch.zeros(9999)}),
):
    try:
        write()
    except (OSError, RuntimeError) as error:
        print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print((folder / "record.json").read_text(), checkpoint.load(folder / "last.pt")["step"])
print(sorted(path.name for path in folder.glob("*.new")))
"""


@on_linux
def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    code = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\n{FULL_DISK}"
    *errors, kept, left = run(code).splitlines()
    assert len(errors) == 2
    assert kept == "old 1"
    assert left == "[]"


def test_the_page_names_tests_that_there_are() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", (root / "docs/testing.md").read_text())
    assert len(named) > 20
    for path, name in named:
        assert (root / path).exists(), path
        assert not name or f"def {name}(" in (root / path).read_text(), f"{path}::{name}"
