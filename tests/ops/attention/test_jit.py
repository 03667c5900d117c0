"""Machine code of functions of pairs: what the interpreter gives, to the last bit."""

import importlib.metadata
import os
import subprocess
import sys
import threading

import pytest
import torch

from fused_attn import explain, flex_attention
from fused_attn.ops.attention.jit import assembly, engine, formulas, llvm, program, text
from fused_attn.runtime import native
from tests.flex import test_compiled as flex

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="needs the compiled part")
needs_llvm = pytest.mark.skipif(llvm.why_not() is not None, reason=str(llvm.why_not()))
CODE = "functions are machine code"


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    engine._kept.clear()
    monkeypatch.setenv("FUSED_ATTN_JIT", "on")


def results(source, mask, dtype, mode, spoil=None):
    """out and every gradient."""
    os.environ["FUSED_ATTN_JIT"] = mode  # the fixture puts it back
    points = flex.points(dtype)
    if spoil is not None:
        with torch.no_grad():
            points[0][0, 0, :3, 0] = torch.tensor(spoil, dtype=dtype)
    learned = {n: x.to(dtype).requires_grad_() for n, x in flex.LEARNED.items()}
    mods = flex.made(source, mask, {**learned, **flex.FIXED})
    out = flex_attention(*points, *mods, scale=0.5, enable_gqa=True)
    dout = flex.normal(*out.shape, seed=30).to(dtype)
    inputs = [*points, *learned.values()]
    return [out, *torch.autograd.grad(out, inputs, dout, allow_unused=True)]


def same(*given, **options):
    """Whether both ways give the same bits."""
    code, interpreted = (results(*given, mode, **options) for mode in ("on", "off"))
    for one, two in zip(code, interpreted, strict=True):
        if one is None or two is None:
            assert one is two is None
        elif not torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0)):
            return False
    return True


def every_program():
    return [kept for kept in engine._kept.values() if kept.code is not None]


def every_source(step=1):
    for n in range(0, len(flex.SCORES), step):
        for dtype in (torch.float32, torch.float64)[: 1 + n % 2]:
            yield flex.SCORES[n], flex.MASKS[n % len(flex.MASKS)], dtype


@needs_llvm
def test_every_instruction_and_its_derivative(monkeypatch):
    used = set()

    def recorded(rows):
        read = program.read(rows)
        used.update(x.operation for stage in read.stages for x in stage)
        return read

    monkeypatch.setattr(engine, "read", recorded)
    for given in every_source():
        assert same(*given), given
    assert not any(kept.failure for kept in engine._kept.values())
    assert used == set(native.module().PAIR_OPERATIONS)


@needs_llvm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_numbers_that_are_none(dtype):
    """Infinite and missing numbers, those whose exponential is none, and 16-bit tensors."""
    for source in (
        "torch.where(s.abs() < 50, torch.tanh(s), torch.maximum(torch.sigmoid(s), s * 0))",
        "torch.exp(s) - torch.minimum(torch.floor(s), s.abs())",
    ):
        assert same(source, flex.MASKS[3], dtype, spoil=[torch.inf, -torch.inf, 1e4])
        assert same(source, flex.MASKS[2], dtype, spoil=[torch.nan, -1e30, 90.0])
    assert len(every_program()) > 3


@needs_llvm
def test_a_mistake_would_be_seen(monkeypatch):
    source = "torch.tanh(s) + apart[h, q - kv + 150]"
    assert same(source, None, torch.float32)
    engine._kept.clear()
    monkeypatch.setattr(formulas, "_TANH", (-0.3334, *formulas._TANH[1:]))
    assert not same(source, None, torch.float32)


@needs_llvm
def test_indices_outside_of_their_table():
    q, k, v = flex.points(torch.float32)
    small = torch.zeros(50)
    for bad in (
        lambda s, b, h, q, kv: s + small[q * kv],
        lambda s, b, h, q, kv: s + small[-q * kv],
    ):
        with pytest.raises(IndexError, match="out of bounds"):
            flex_attention(q, k, v, bad, enable_gqa=True)
    assert every_program()


@needs_llvm
def test_a_table_beyond_32_bits(monkeypatch):
    narrow = program.Leaf
    monkeypatch.setattr(program, "Leaf", lambda dtype, dims, _: narrow(dtype, dims, False))
    for n in (14, 16, 19):
        assert same(flex.SCORES[n], flex.MASKS[2], torch.float32)


@needs_llvm
@pytest.mark.parametrize("seqlen_q", [1, 5, 16, 17, 64])
def test_few_queries(seqlen_q):
    q, k, v = (x.detach() for x in flex.points(torch.float32, seqlen_q))
    outs = []
    for mode in ("on", "off"):
        os.environ["FUSED_ATTN_JIT"] = mode
        values = {n: x.float() for n, x in flex.LEARNED.items()}
        mods = flex.made("s * s.abs() + apart[h, q - kv + 150]", "(q * kv) % 3 != 1", values)
        outs.append(flex_attention(q, k, v, *mods, enable_gqa=True))
    assert torch.equal(*outs)


@needs_llvm
def test_the_slowest_level():
    code = (
        "from tests.ops.attention import test_jit as t\n"
        "for given in t.every_source(5):\n"
        "    assert t.same(*given), given\n"
        "assert len(t.every_program()) > 8\n"
        "assert not any(kept.failure for kept in t.engine._kept.values())\n"
    )
    env = {**os.environ, "FUSED_ATTN_CPU": "portable", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_llvm
@pytest.mark.parametrize(
    ("triple", "cpu", "size", "wide"),
    [("x86_64-linux-gnu", "x86-64-v4", 64, False), ("x86_64-linux-gnu", "x86-64-v4", 64, True),
     ("aarch64-linux-gnu", "generic", 16, False), ("aarch64-linux-gnu", "generic", 16, True)],
)  # fmt: skip
def test_processors_that_are_not_here(triple, cpu, size, wide, monkeypatch):
    """Their code is made, if not run."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu)
    made = []

    def for_another(*given):
        target = text.Target(size, wide, fused=True, rounds=True, halves=True)
        module = binding.parse_assembly(assembly.assembly_of(given[0], given[1], target, given[3]))
        module.verify()
        made.append(machine.emit_object(module))
        return assembly.assembly_of(*given)

    monkeypatch.setattr(engine, "assembly_of", for_another)
    for n in (4, 13, 16, 22, 24):
        results(flex.SCORES[n], flex.MASKS[3], torch.float64 if wide else torch.float32, "on")
    assert len(made) > 10


def square(s, b, h, q, kv):
    return s * s


def sine(s, b, h, q, kv):
    return torch.sin(s)


def noted(function=square, part=150):
    """How a call on so many keys is run."""
    q, k, v = (x.detach() for x in flex.points(torch.float32))
    given = (q, k[:, :, :part], v[:, :, :part], function)
    return explain(flex_attention, *given, enable_gqa=True).notes


@needs_llvm
def test_code_is_made_when_it_is_worth_it(monkeypatch):
    monkeypatch.setenv("FUSED_ATTN_JIT", "auto")
    assert "few pairs so far" in noted()[1]
    [kept] = engine._kept.values()
    calls = engine._WORTH / kept.work
    assert calls > 100
    kept.work *= calls - 3
    said = [noted() for _ in range(3)]
    assert ["few pairs so far" in each[1] for each in said] == [True, True, False]
    assert said[2] == ("runs in the kernel's own loop", CODE)
    assert noted(part=20)[1] == "functions are interpreted: few pairs"
    monkeypatch.setattr(engine, "_WORTH", 0)
    assert "calls of the C library" in noted(sine)[1]
    monkeypatch.setenv("FUSED_ATTN_JIT", "off")
    assert noted()[1] == "functions are interpreted: FUSED_ATTN_JIT=off"
    monkeypatch.setenv("FUSED_ATTN_JIT", "perhaps")
    with pytest.raises(ValueError, match="FUSED_ATTN_JIT must be one of auto, on, off"):
        noted()


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, 'not installed: pip install "fused_attn[jit]"'),
     ("0.44.0", "0.44.0 is older than 0.45"),
     ("0.50.0", "does not work here: OSError: no library")],
)  # fmt: skip
def test_without_a_working_llvmlite(version, words, monkeypatch):
    known = importlib.metadata.version

    def asked(name):
        if name != "llvmlite":
            return known(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    def started():
        raise OSError("no library")

    monkeypatch.setattr(importlib.metadata, "version", asked)
    if version is not None:
        monkeypatch.setattr(llvm, "_started", started)
    llvm.why_not.cache_clear()
    llvm.broken.cache_clear()
    try:
        said = noted()
        assert words in said[1]
        assert said[1].startswith("functions are interpreted: ")
        assert not every_program()
    finally:
        llvm.why_not.cache_clear()
        llvm.broken.cache_clear()


@needs_llvm
def test_what_llvm_refuses_is_interpreted(monkeypatch):
    monkeypatch.setattr(engine, "assembly_of", lambda *given: "define nothing")
    for _ in range(2):
        assert "LLVM refuses the code of them" in noted()[1]
    assert not every_program()


@needs_llvm
def test_threads_and_forks():
    wanted, found = results("s * s.abs()", flex.MASKS[3], torch.float32, "off"), []
    os.environ["FUSED_ATTN_JIT"] = "on"

    def run(n):
        found.append(results(f"s * s.abs() + {n} * 0", flex.MASKS[3], torch.float32, "on"))

    threads = [threading.Thread(target=run, args=(n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each, wanted, strict=True) if b is not None)
    assert len(found) == 4
    code = (  # OpenMP's threads do not survive a fork: one thread
        "import os, torch\n"
        "torch.set_num_threads(1)\n"
        "from tests.ops.attention import test_jit as t\n"
        "before = t.results('s * s', None, torch.float32, 'on')\n"
        "child = os.fork()\n"
        "for source in ('s * s', 's * s.abs()'):  # made by the parent, and not\n"
        "    assert t.same(source, None, torch.float32)\n"
        "if child == 0: os._exit(len(t.every_program()) != 4)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_llvm
def test_code_that_is_forgotten_may_be_running(monkeypatch):
    """A call keeps its own code; what is kept for later calls is bounded."""
    monkeypatch.setattr(engine, "_MOST", 2)
    for n in range(5):
        assert same(f"s * s.abs() + {n}.5 * s", None, torch.float32)
        assert len(engine._kept) <= 2
