"""What each task of a kernel writes: no two of one loop, which may run at once, write one place.

The loops of `fused_attn._C` run task by task, in a process of their own, in one thread, with a
library in the place of OpenMP's that looks after each task at what has changed
(tests/cpu/threads/watch.cpp). So it does not depend on how threads happen to meet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_attn.runtime import native

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "cpu" / "threads" / "watch.cpp"
COMPILER = next((x for x in (os.environ.get("CXX"), "g++", "c++") if x and shutil.which(x)), None)

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason="no compiled part"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does"),
]

CODE = """
import ctypes, json, os, sys
import torch
import fused_attn
from fused_attn import attention
from fused_attn.ops.attention import fast_path, fused

library = ctypes.CDLL(os.environ["LD_PRELOAD"])
library.watch.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

def watched(allocate):
    def watch(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if type(tensor) is torch.Tensor and tensor.numel():
            library.watch(tensor.data_ptr(), tensor.numel(), tensor.element_size())
        return tensor
    return watch

fused.empty_like = fast_path.empty_like = watched(torch.empty_like)
for name in ("empty", "empty_like", "empty_permuted", "zeros", "zeros_like"):
    setattr(torch, name, watched(getattr(torch, name)))

def report():
    numbers = (ctypes.c_int64 * 4)()
    library.report(numbers)
    return list(numbers)

torch.set_num_threads(3)
found = {}

def call(name, run, *inputs):
    out = run(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    forward = report()
    grads = [torch.randn(x.shape, dtype=x.dtype) for x in out]
    report()
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    torch.autograd.grad(out, wanted, grads)
    found[name] = forward, report()

def randn(*shape):
    return torch.randn(shape).requires_grad_()

torch.manual_seed(0)
report()
sizes = {"b": 2, "h": 2, "q": 70, "k": 600}
for shared in ("", "b", "h", "bh", "bhq", "bhk", "q", "k", "bhqk", "bq", "hk"):
    bias = randn(*(1 if d in shared else n for d, n in sizes.items()))
    q, k, v = randn(2, 2, 70, 16), randn(2, 2, 600, 16), randn(2, 2, 600, 16)
    call("bias, one over " + (shared or "nothing"),
         lambda q, k, v, b: attention(q, k, v, bias=b, return_lse=True), q, k, v, bias)
q, k, v = randn(1, 1, 130, 32), randn(1, 1, 700, 32), randn(1, 1, 700, 32)
call("one head in parts", attention, q, k, v)
q, k, v = randn(1, 4, 100, 32), randn(1, 2, 600, 32), randn(1, 2, 600, 32)
call("shared keys", lambda *x: attention(*x, causal="lower_right"), q, k, v)
call("decoding", attention, randn(1, 4, 1, 128), randn(1, 2, 8192, 128), randn(1, 2, 8192, 128))
call("weights", lambda *x: attention(*x, return_weights="average"), q, k, v)
starts = torch.tensor([0, 40, 40, 300], dtype=torch.int32)
call("packed", lambda *x: fused_attn.attention_varlen(*x, starts, starts, 260, 260),
     randn(300, 2, 32), randn(300, 2, 32), randn(300, 2, 32))
x, w, b = randn(300, 200), randn(200), randn(200)
call("layer_norm", lambda x, w, b: fused_attn.layer_norm(x, (200,), w, b), x, w, b)
call("activation", lambda x, b: fused_attn.bias_activation(x, b, activation="gelu"), x, b)
tokens = (torch.arange(500) ** 2 % 300).view(5, 100)
call("embedding", lambda w, t: fused_attn.embedding(tokens, w, table=t), randn(300, 100),
     randn(120, 100))
call("linear", lambda *x: fused_attn.linear(*x, backend="cpu"), randn(300, 200), randn(150, 200),
     randn(150))

place = torch.zeros(2)
report()
library.watch(place.data_ptr(), 2, 4)
library.planted(ctypes.c_void_p(place.data_ptr()))
found["planted"] = [0] * 4, report()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """(loops, tasks of the longest, elements written, written by two tasks), forward and back."""
    library = tmp_path_factory.mktemp("watch") / "watch.so"
    assert COMPILER is not None
    flags = ("-std=c++17", "-O1", "-fopenmp", "-fPIC", "-shared")
    subprocess.run((COMPILER, *flags, SOURCE, "-o", library), check=True)
    done = subprocess.run(
        (sys.executable, "-c", CODE),
        env={**os.environ, "LD_PRELOAD": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    if found["planted"][1][0] == 0 and "gcc" not in native.module().build_info()["compiler"]:
        pytest.skip("the compiler's loops are not gcc's")
    return found


def test_two_tasks_that_write_one_place_are_seen(reports: dict[str, Any]) -> None:
    assert reports.pop("planted")[1] == [1, 4, 4, 2]


def test_no_two_tasks_of_a_loop_write_one_place(reports: dict[str, Any]) -> None:
    for name, directions in reports.items():
        if name == "planted":
            continue
        for direction, (loops, tasks, written, shared) in zip(
            ("forward", "backward"), directions, strict=True
        ):
            # A bias that is one for all heads and batch elements is one thread's.
            alone = direction == "backward" and "bh" in name
            assert alone or (loops > 0 and tasks > 1), f"{name}, {direction}: ran in no loop"
            assert alone or written > 0, f"{name}, {direction}: nothing was seen to be written"
            assert shared == 0, f"{name}, {direction}: {shared} elements by two tasks of a loop"
