"""Threads of the kernels: as many as torch says, equal results, safe beside others and in a fork.

What has to start from a process without threads runs in one of its own.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn.runtime import native
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain

THREADS = 3
pytestmark = pytest.mark.skipif(native.why_not() is not None, reason="no compiled part")


@pytest.fixture
def several_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


# One or few heads, so that a head has to be shared out: by keys in decoding and in the backward, by
# queries in the forward. A shared bias makes all heads add to one gradient.
CASES = {
    "decoding": Case(batch=1, num_heads=1, num_heads_kv=1, seqlen_q=1, seqlen_k=2100, head_dim=32),
    "few queries": Case(
        batch=1, num_heads=4, num_heads_kv=2, seqlen_q=3, seqlen_k=1500, causal="lower_right"
    ),
    "one head": Case(batch=1, num_heads=1, num_heads_kv=1, seqlen_q=300, seqlen_k=700, head_dim=32),
    "causal": Case(batch=1, num_heads=2, num_heads_kv=1, seqlen_q=513, seqlen_k=600, causal=True),
    "window": Case(
        batch=1, num_heads=1, num_heads_kv=1, seqlen_q=600, seqlen_k=600, window=(333, 7)
    ),
    "shared bias": Case(batch=2, num_heads=2, seqlen_q=130, seqlen_k=600, bias="11qk"),
    "bias of keys": Case(
        batch=2, num_heads=1, num_heads_kv=1, seqlen_q=130, seqlen_k=600, bias="111k"
    ),
    "bias of queries": Case(
        batch=2, num_heads=1, num_heads_kv=1, seqlen_q=130, seqlen_k=600, bias="11q1"
    ),
    "padding": Case(
        batch=2, num_heads=1, num_heads_kv=1, seqlen_q=100, seqlen_k=900, padding="lengths"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_shared_out_heads_agree_with_the_oracle(
    name: str, dtype: torch.dtype, several_threads: None
) -> None:
    case = CASES[name]
    check_against_oracle(
        functools.partial(run_backend, case, "cpu"),
        functools.partial(run_plain, case),
        case.tensors(dtype),
        ("out", "lse", "weights"),
        attention_noise,
    )


def results(case: Case) -> list[Tensor]:
    tensors = case.tensors(torch.float32)
    out = run_backend(case, "cpu", **tensors)[0]
    assert out is not None
    inputs = [x for x in tensors.values() if x.requires_grad]
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("name", CASES)
def test_repeated_calls_are_bitwise_equal(name: str, several_threads: None) -> None:
    first = results(CASES[name])
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(CASES[name]), strict=True))


def test_calls_from_several_python_threads_do_not_meet(several_threads: None) -> None:
    def work(case: Case) -> list[Tensor]:
        torch.set_num_threads(THREADS)  # a number of each thread
        return results(case)

    cases = list(CASES.values()) * 3
    expected = [work(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, cases))
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(code: str) -> str:
    preamble = """
import os, torch, fused_attn
x = torch.linspace(-1, 1, 4 * 512 * 64).view(1, 4, 512, 64)
w = torch.ones(64)
def work():
    tokens = torch.arange(2048).view(4, 512) % 512
    rows = fused_attn.embedding(tokens, x[0, 0])
    return fused_attn.attention(x, x, x), fused_attn.layer_norm(x, (64,), w), rows
"""
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_set_num_threads_is_obeyed() -> None:
    # By their numbers: a thread of somebody else may end meanwhile.
    code = """
def threads_after(wanted):
    torch.set_num_threads(wanted)
    work()
    return set(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = set(os.listdir("/proc/self/task"))
one = threads_after(1)
three = threads_after(3)
print(len(one - before), len(three - one))
"""
    assert run(code) == "0 2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_the_same() -> None:
    code = """
torch.set_num_threads(2)
expected = work()
child = os.fork()
if child == 0:
    found = work()
    torch.set_num_threads(1)  # torch's own operators would wait for threads that are gone
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(expected, found)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"
