"""What reaches the driver from repeated calls (`runtime/triton/replay.py`), and from others.

`python -m tests.cases.replayed_launches` runs calls of every operation on a GPU that is not there
(`benchmarks/fake_gpu`), each as ever and then again and again, then all of them with new tensors,
and prints a JSON object: for each call what differed, argument for argument, and how often it was
repeated. Kernels are not compiled: what stands for one is told apart by what Triton would have
compiled it for.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import fake_gpu
from fused_attn.ops.attention.problem import Operands, make_options
from fused_attn.ops.bias_activation import problem as activation
from fused_attn.ops.layer_norm import problem as norm
from fused_attn.runtime.triton import replay

Call = tuple[Callable[[], None], list[Tensor]]  # runs it, and the tensors that it is given


class Metadata(NamedTuple):
    """Of a compiled kernel, as far as a launch asks."""

    num_warps: int
    shared: int
    tensordesc_meta: list[dict[str, Any]]
    name: str = "stub"
    num_ctas: int = 1
    global_scratch_size: int = 0
    global_scratch_align: int = 1
    profile_scratch_size: int = 0
    profile_scratch_align: int = 1
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False


class Compiled:
    """Stands for a kernel of Triton's: a launch goes through Triton's own launcher."""

    made = 0

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        from triton.runtime import driver

        Compiled.made += 1
        self.function = Compiled.made  # the handle
        described = [t for t in source.signature.values() if str(t).startswith("tensordesc")]
        maps = [{"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [1, 1, 64, 64],
                 "fp4_padded": False} for _ in described]  # fmt: skip
        self.metadata = Metadata(options["num_warps"], 1024 + Compiled.made, maps)
        self.src, self.sizes, self.kinds = source, [], []
        for kind in _flat(source.signature.values()):
            self._add(kind)
        self.packed_metadata: tuple[int, ...] = (options["num_warps"], 1, self.metadata.shared)
        if "cluster_dims" in options:
            self.packed_metadata += tuple(options["cluster_dims"])
        self.run = driver.active.launcher_cls(source, self.metadata)
        driver.active.describe(self.function, [*self.sizes, 8, 8])
        compiled[self.function] = self

    def _add(self, kind: str) -> None:
        if kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            kinds = ["map", *["i32"] * rank, *["i64"] * rank]
        else:
            kinds = ["pointer" if kind.startswith("*") else kind]
        sizes = {"pointer": 8, "map": 128}
        self.kinds += kinds
        self.sizes += [sizes.get(each) or fake_gpu.BYTES[each] for each in kinds]

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> Any:
        return {"name": self.src.fn.__name__, "grid": grid}

    def values(self, parameters: bytes) -> list[tuple[str, bytes]]:
        """The parameters of a launch one by one, each with its kind."""
        found, at = [], 0
        for kind, size in zip(
            (*self.kinds, "pointer", "pointer"), (*self.sizes, 8, 8), strict=True
        ):
            found.append((kind, parameters[at : at + size]))
            at += size
        assert at == len(parameters)
        return found


compiled: dict[int, Compiled] = {}  # by handle


def _flat(kinds: Any) -> Iterator[str]:
    for kind in kinds:
        if isinstance(kind, tuple):
            yield from _flat(kind)
        elif kind != "constexpr":
            yield kind


@contextlib.contextmanager
def nothing_compiled() -> Iterator[fake_gpu.FakeGpu]:
    """A GPU that is not there, and no compiler."""

    def compile_it(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Compiled:
        return Compiled(source, options)

    with mock.patch("triton.compiler.compile", compile_it), fake_gpu.standing_in() as gpu:
        yield gpu


def launches(call: Callable[[], None]) -> list[tuple[Compiled, fake_gpu.Launch]]:
    from triton.runtime import driver

    driver.active.taken()
    call()
    return [(compiled[launch.function], launch) for launch in driver.active.taken()]


def differences(usual: list[Any], again: list[Any], given: list[Tensor]) -> list[str]:
    """What two runs of a call passed to the driver; temporary tensors may be elsewhere."""
    if [kernel.function for kernel, _ in usual] != [kernel.function for kernel, _ in again]:
        names = [[f"{k.src.fn.__name__} {k.function}" for k, _ in run] for run in (usual, again)]
        return [f"kernels {names[0]} became {names[1]}"]
    memory = [x.untyped_storage() for x in given]
    ranges = [(x.data_ptr(), x.data_ptr() + max(x.nbytes(), 1)) for x in memory]
    found, moved = [], {}
    for (kernel, before), (_, after) in zip(usual, again, strict=True):
        name = kernel.src.fn.__name__
        if before._replace(parameters=b"") != after._replace(parameters=b""):
            found.append(f"{name}: {before[:5]} became {after[:5]}")
        pairs = zip(kernel.values(before.parameters), kernel.values(after.parameters), strict=True)
        for number, ((kind, old), (_, new)) in enumerate(pairs):
            start, now = int.from_bytes(old, "little"), int.from_bytes(new, "little")
            temporary = kind == "pointer" and start and not any(a <= start < b for a, b in ranges)
            if temporary and now and now % 16 == 0:
                if moved.setdefault(start, now) != now or any(a <= now < b for a, b in ranges):
                    found.append(f"{name}: temporary {number} is another one")
            elif old != new:
                found.append(f"{name}: argument {number} ({kind}) {old.hex()} became {new.hex()}")
    if len(set(moved.values())) != len(moved):
        found.append("two temporaries became one")
    return found


def half(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def off(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Starts at no multiple of 16 bytes."""
    count = torch.Size(shape).numel()
    return torch.zeros(count + 1, dtype=dtype)[1:].view(shape)


def blhd(*shape: int) -> Tensor:
    batch, heads, length, size = shape
    return half(batch, length, heads, size).transpose(1, 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, backward: bool = False, weights: bool = False,
    dbias: bool = False, options: dict[str, Any] | None = None, **operands: Tensor,
) -> Call:  # fmt: skip
    from fused_attn.ops.attention.triton import launch

    given = Operands(q, k, v, **operands)
    packed = "cu_seqlens_q" in operands
    lengths = {"max_seqlen_q": 33 if packed else q.shape[2], "max_seqlen_k": k.shape[2]}
    chosen = make_options(**lengths, head_dim=q.shape[3], **(options or {}))
    out = half(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = half(*q.shape[:3], dtype=torch.float32)
    tensors = [x for x in given if x is not None] + [out, lse]
    if weights:
        shown = half(*q.shape[:3], k.shape[2], dtype=q.dtype)
        tensors.append(shown)
        return lambda: launch.weights(given, chosen, lse, shown, False), tensors
    if not backward:
        return lambda: launch.forward(given, chosen, out, lse), tensors
    bias = given.bias
    dbias_ = half(*bias.shape, dtype=torch.float32) if dbias and bias is not None else None
    dout, grads = torch.zeros_like(out), (*map(torch.zeros_like, (q, k, v)), dbias_)
    tensors += [dout, *[grad for grad in grads if grad is not None]]
    return lambda: launch.backward(given, chosen, out, lse, dout, None, None, grads), tensors


def layer_norm(x: Tensor, residual: bool, dropout_p: float, rms: bool, backward: bool) -> Call:
    from fused_attn.ops.layer_norm.triton import launch

    width = x.shape[-1]
    weight, bias = half(width), None if rms else half(width)
    rng = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    given = norm.Operands(x, torch.zeros_like(x) if residual else None, weight, bias, rng)
    options = norm.make_options(dims=1, dtype=x.dtype, eps=1e-5, rms=rms, dropout_p=dropout_p)
    rows = x.shape[:-1]
    y, h = half(*x.shape), half(*x.shape) if residual else None
    mean = None if rms else half(*rows, dtype=torch.float32)
    rstd = half(*rows, dtype=torch.float32)
    tensors = [t for t in (*given, y, h, mean, rstd) if t is not None]
    if not backward:
        return lambda: launch.forward(given, options, y, h, mean, rstd), tensors
    grads = (half(*x.shape), half(*x.shape) if residual else None, torch.zeros_like(weight),
             None if bias is None else torch.zeros_like(bias))  # fmt: skip
    tensors += [grad for grad in grads if grad is not None]
    return lambda: launch.backward(given, options, False, mean, rstd, y, h, grads), tensors


def bias_activation(x: Tensor, gated: bool, dropout_p: float, backward: bool) -> Call:
    from fused_attn.ops.bias_activation.triton import launch

    bias = half(x.shape[-1])
    rng = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    given = activation.Operands(x, bias, rng)
    options = activation.make_options(activation="gelu", gated=gated, dropout_p=dropout_p)
    y = half(*x.shape[:-1], x.shape[-1] // (2 if gated else 1))
    tensors = [t for t in (*given, y) if t is not None]
    if not backward:
        return lambda: launch.forward(given, options, y), tensors
    dx, dbias = torch.zeros_like(x), torch.zeros_like(bias)
    return lambda: launch.backward(given, options, y, dx, dbias), [*tensors, dx, dbias]


def calls() -> Iterator[tuple[str, Call]]:
    """Every operation; shapes, strides and starts of several kinds."""
    shape = (2, 4, 33, 64)
    one = half(*shape)  # first: noted with one tensor, repeated with three
    yield "one tensor three times", attention(one, one, one, True)
    makers = {"dense": half, "misaligned": off, "(B, L, H, D)": blhd}
    for name, make in makers.items():
        for backward in (False, True):
            yield f"{name} {backward=}", attention(*(make(*shape) for _ in "qkv"), backward)
    brain = half(*shape, dtype=torch.bfloat16)
    yield "bfloat16", attention(brain, brain, brain, True)
    yield "one misaligned of three", attention(half(*shape), off(*shape), half(*shape), True)
    packed_qkv = half(2, 33, 3, 4, 64).unbind(2)
    yield "slices of one", attention(*(x.transpose(1, 2) for x in packed_qkv), True)
    for length in (1, 16, 17, 1024):
        yield f"length {length}", attention(*(half(1, 2, length, 64) for _ in "qkv"), length < 1024)
    yield "float32", attention(*(half(*shape, dtype=torch.float32) for _ in "qkv"), True)
    yield "grouped", attention(half(*shape), half(2, 2, 40, 64), half(2, 2, 40, 32), True)
    for causal in (True, "upper_left"):
        yield f"{causal=}", attention(*[half(*shape)] * 3, True, options={"causal": causal})
    for options in ({"window": (4, 0)}, {"softcap": 20.0}, {"scale": 1.0}, {"chunk": 8}):
        yield str(options), attention(*[half(*shape)] * 3, True, options=options)
    yield "decode", attention(half(2, 4, 1, 64), half(2, 4, 2048, 64), half(2, 4, 2048, 64))
    yield "weights", attention(*[half(*shape)] * 3, weights=True)
    bias, seen = half(2, 4, 33, 33), torch.ones(2, 1, 33, 33, dtype=torch.bool)
    yield "bias", attention(*[half(*shape)] * 3, True, dbias=True, bias=bias)
    yield "broadcast bias", attention(*[half(*shape)] * 3, True, dbias=True, bias=bias[:1, :, :1])
    yield "mask", attention(*[half(*shape)] * 3, True, mask=seen)
    long = half(1, 16, 2048, 64)
    listed = torch.ones(1, 1, 2048, 2048, dtype=torch.bool)
    yield "mask with a list of tiles", attention(long, long, long, False, mask=listed)
    padding = torch.ones(2, 33, dtype=torch.bool)
    yield "padding", attention(*[half(*shape)] * 3, True, key_padding_mask=padding)
    lengths = torch.tensor([3, 33])
    yield "lengths", attention(*[half(*shape)] * 3, True, key_lengths=lengths)
    slopes = torch.ones(4)
    yield "alibi", attention(*[half(*shape)] * 3, True, alibi_slopes=slopes)
    rng = torch.zeros(2, dtype=torch.int64)
    for p in (0.1, 1.0):
        yield (
            f"dropout {p}",
            attention(*[half(*shape)] * 3, True, options={"dropout_p": p}, dropout_rng=rng),
        )
    cu = torch.tensor([0, 3, 30], dtype=torch.int32)
    yield (
        "packed",
        attention(*[half(1, 4, 33, 64)] * 3, True, cu_seqlens_q=cu, cu_seqlens_k=cu.clone()),
    )
    ids = torch.zeros(2, 33, dtype=torch.int64)
    yield (
        "documents",
        attention(*[half(*shape)] * 3, True, query_documents=ids, key_documents=ids.clone()),
    )
    for backward in (False, True):
        for residual, p, rms in ((False, 0.0, False), (True, 0.5, False), (True, 0.0, True)):
            name = f"layer norm {residual=} {p=} {rms=} {backward=}"
            yield name, layer_norm(half(5, 7, 48), residual, p, rms, backward)
        yield f"misaligned norm {backward=}", layer_norm(off(5, 48), False, 0.0, False, backward)
        yield f"norm of columns {backward=}", layer_norm(half(48, 5).T, False, 0.0, False, backward)
        yield f"wide norm {backward=}", layer_norm(half(3, 9000), False, 0.0, False, backward)
        for gated, p in ((False, 0.0), (True, 0.0), (False, 0.5)):
            name = f"bias activation {gated=} {p=} {backward=}"
            yield name, bias_activation(half(9, 64), gated, p, backward)


REPEATS = 4


def compare(call: Call) -> dict[str, Any]:
    run, given = call
    with mock.patch.object(replay, "_paused", 1):  # `paused` would forget the other calls
        usual = launches(run)
    compilations = Compiled.made
    found: list[str] = []
    repeated = 0
    for _ in range(REPEATS):
        with mock.patch.object(
            replay.Tape, "run", autospec=True, side_effect=replay.Tape.run
        ) as ran:
            again = launches(run)
        repeated += ran.call_count
        found += differences(usual, again, given)
    if Compiled.made != compilations:
        found.append(f"{Compiled.made - compilations} kernels were compiled anew")
    return {"launches": len(usual), "repeated": repeated, "differences": found}


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    with nothing_compiled():
        passes = [
            {name: compare(call) for name, call in calls() if wanted in name} for _ in range(2)
        ]
        print(json.dumps(passes))
