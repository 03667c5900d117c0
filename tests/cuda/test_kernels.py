"""The CUDA backend's own promises, on a GPU or, without one, on the emulated device.

That it computes what every backend computes is tested with them all (test_attention*.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_attn import attention, attention_varlen
from fused_attn.ops.attention import cuda
from fused_attn.runtime import cuda as cuda_runtime
from fused_attn.testing import attention_noise, check_against_oracle
from tests.cases.attention import Case, run_backend, run_plain

if cuda_runtime.emulated():
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available() and not cuda_runtime.why_not(torch.device("cuda"), exactly=(9, 0)):
    DEVICE = torch.device("cuda")
else:
    pytest.skip("needs the emulator (make test builds it) or a GPU", allow_module_level=True)

on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU of compute capability 9.0")


@pytest.fixture(params=[False, True], ids=["default", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[bool]:
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).half().requires_grad_()


def check_with_oracle(case: Case, tensors: dict[str, Tensor]) -> None:
    check_against_oracle(
        functools.partial(run_backend, case, "cuda"),
        functools.partial(run_plain, case),
        {
            name: x.detach().to(DEVICE).requires_grad_(x.requires_grad)
            for name, x in tensors.items()
        },
        ("out", "lse", "weights"),
        attention_noise,
    )


# Two tiles of queries and of keys and some more, with few operands and with all.
KINDS = {
    "plain": Case(1, 2, 1, 70, 150, causal="lower_right", padding="lengths"),
    "general": Case(
        2, 2, 1, 70, 150, causal="lower_right", window=(100, 0), padding="holes", mask="b1qk",
        bias="1hqk", alibi=True, softcap=5.0, dropout_p=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_every_compiled_head_size(
    kind: str, head_dim: int, deterministic: bool, one_thread: None
) -> None:
    case = Case(**{**KINDS[kind].__dict__, "head_dim": head_dim})
    dtype = torch.float16 if head_dim % 128 else torch.bfloat16
    check_with_oracle(case, case.tensors(dtype))


def block_mask(*shape: int, share: float = 0.5, cell: int = 128) -> Tensor:
    """Visible in that share of its cells, which are no smaller than the kernels' tiles."""
    *planes, rows, columns = shape
    cells = torch.rand(*planes, -(-rows // cell), -(-columns // cell)) < share
    return cells.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[..., :rows, :columns]


def sparse_mask(*shape: int) -> Tensor:
    """Cells that are hidden, others with holes, and a row of cells without any key."""
    mask = block_mask(*shape) & (torch.rand(shape) < 0.8)
    if shape[-2] > 128:
        mask[..., 128:256, :] = False
    return mask


def one_blind_head() -> Tensor:
    mask = sparse_mask(1, 4, 150, 260)
    mask[:, 1] = False
    return mask


MASKED = {
    "rows of tiles": (Case(2, 2, 1, 300, 150), lambda: sparse_mask(2, 1, 300, 150)),
    "of each head": (Case(1, 4, 2, 150, 260, 64), one_blind_head),
    "of keys": (Case(2, 2, 2, 70, 300), lambda: sparse_mask(2, 1, 1, 300)),
    "of queries": (Case(1, 2, 1, 300, 70), lambda: sparse_mask(1, 2, 300, 1)),
    "of heads": (Case(1, 3, 1, 20, 70), lambda: torch.tensor([True, False, True]).view(1, 3, 1, 1)),
    "causal": (Case(1, 2, 1, 200, 300, causal="lower_right"), lambda: sparse_mask(1, 1, 200, 300)),
    "transposed": (
        Case(1, 1, 1, 150, 200, window=(100, 9)), lambda: sparse_mask(1, 1, 200, 150).mT,
    ),
    "everything": (
        Case(1, 2, 1, 270, 290, causal="lower_right", window=(200, 0), padding="holes",
             bias="11qk", alibi=True, softcap=5.0, dropout_p=0.2),
        lambda: sparse_mask(1, 2, 270, 290),
    ),
} | {
    # Wherever a tile's only element is, it must be found; masks are read by 16, 4 or 1 bytes.
    f"few elements of {columns}": (
        Case(1, 2, 1, 260, columns), lambda columns=columns: torch.rand(1, 2, 260, columns) < 3e-4,
    )
    for columns in (256, 260, 261)
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_masks_that_hide_whole_tiles(kind: str, deterministic: bool, one_thread: None) -> None:
    case, make_mask = MASKED[kind]
    check_with_oracle(case, {**case.tensors(torch.float16), "mask": make_mask()})


@pytest.mark.parametrize("head_dim", [64, 256])
def test_hidden_tiles_are_never_touched(head_dim: int, deterministic: bool) -> None:
    """Two halves that do not see each other, one of them NaN, which times 0 would be NaN."""
    half = 128
    shapes = [(1, 2, half, head_dim), (1, 1, half, head_dim), (1, 1, half, head_dim)]
    clean = [randn(*shape).detach() for shape in (*shapes, shapes[0])]  # q, k, v, dout
    both = [torch.cat((x, torch.full_like(x, torch.nan)), 2) for x in clean]
    mask = torch.eye(2, dtype=torch.bool, device=DEVICE)
    mask = mask.repeat_interleave(half, 0).repeat_interleave(half, 1)[None, None]

    def results(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        seen = mask[..., : q.shape[2], : k.shape[2]]
        out, lse = attention(*inputs, mask=seen, return_lse=True, backend="cuda")
        return (out, lse, *torch.autograd.grad(out, inputs, dout))

    for found, expected in zip(results(*both), results(*clean), strict=True):
        torch.testing.assert_close(found[:, :, :half], expected)
        assert found[:, :, half:].isnan().all()


def products(mask: Tensor) -> int:
    """Matrix instructions of a forward and a backward pass of 4 heads, two and two of which share
    keys.
    """
    if DEVICE.type != "cpu":
        pytest.skip("counts the emulator's products")
    seqlen_q, seqlen_k = mask.shape[2:]
    q, k, v = randn(1, 4, seqlen_q, 16), randn(1, 2, seqlen_k, 16), randn(1, 2, seqlen_k, 16)
    before = cuda_runtime.module().matrix_products()
    attention(q, k, v, mask=mask, backend="cuda").sum().backward()
    return cuda_runtime.module().matrix_products() - before


@pytest.mark.parametrize("view", ["16 bytes", "4 bytes", "bytes", "transposed", "of all heads"])
def test_hidden_tiles_cost_no_products(view: str, deterministic: bool) -> None:
    """Whichever way the mask is read."""
    mask = block_mask(1, 1 if view == "of all heads" else 4, 256, 384)
    if view == "transposed":
        mask = mask.mT.contiguous().mT
    if margin := {"16 bytes": 16, "4 bytes": 4, "bytes": 1}.get(view):
        mask = torch.nn.functional.pad(mask, (margin, 0), value=True)[..., margin:]
    visible = int(mask.sum())
    assert 0 < visible < mask.numel(), "nothing would be proven"
    assert products(mask) * mask.numel() == products(torch.ones_like(mask)) * visible


@pytest.mark.parametrize("margin", [16, 4, 1])
def test_nothing_past_the_ends_of_a_mask_is_read(margin: int, deterministic: bool) -> None:
    wide = torch.ones(1, 4, 200 + 2 * margin, 288 + 2 * margin, dtype=torch.bool)
    mask = wide[..., margin:-margin, margin:-margin]
    assert products(mask) > 0
    mask.fill_(False)
    assert products(mask) == 0


def test_dq_is_added_up_unless_it_must_repeat(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    choose = cuda._adds_up_dq
    monkeypatch.setattr(cuda, "_adds_up_dq", lambda *x: chosen.append(choose(*x)) or chosen[-1])
    for wanted in ("qkv", "qv", "q", "kv"):
        tensors = [randn(1, 1, 9, 8).requires_grad_(name in wanted) for name in "qkv"]
        attention(*tensors, backend="cuda").sum().backward()
    together = not deterministic
    # Alone, dq takes three products, and dk and dv four.
    assert chosen == [together, together, False, False]


def test_packed_gradients_are_those_of_the_sequences(deterministic: bool) -> None:
    lengths = (70, 0, 1, 130)
    ends = torch.tensor((0, *lengths), device=DEVICE).cumsum(0, dtype=torch.int32)
    rows = int(ends[-1]) + 3  # some that belong to no sequence
    q, k, v = (randn(rows, 2, 40) for _ in range(3))
    out = attention_varlen(q, k, v, ends, ends, 130, 130, causal=True, backend="cuda")
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for begin, end in itertools.pairwise(ends):
        parts = [x[begin:end].detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        alone = attention(*parts, causal=True, backend="cuda")
        expected = torch.autograd.grad(alone, parts, dout[begin:end].transpose(0, 1)[None])
        for whole, part in zip(found, expected, strict=True):
            torch.testing.assert_close(whole[begin:end], part[0].transpose(0, 1))
    for gradient in found:
        assert not gradient[ends[-1] :].any()


def test_a_gradient_goes_where_its_tensor_says(deterministic: bool) -> None:
    """Into strides that no tensor map describes, and past nobody's edge."""
    for columns, offset in ((24, 0), (20, 3)):
        q = randn(2, 2, 30, columns)
        storage = torch.full((2, 30, 2, 2 * columns + 8), 7.0, device=DEVICE, dtype=torch.half)
        dq = storage[..., offset : offset + 2 * columns : 2].transpose(1, 2)
        k, v = randn(2, 2, 40, columns), randn(2, 2, 40, columns)
        out, lse = attention(q, k, v, return_lse=True, backend="cuda")
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        problem = cuda_call(q, k, v)
        with torch.no_grad():
            cuda.backward(*problem, out, lse, torch.ones_like(out), None, None, dq, dk, dv, None)
        expected = torch.autograd.grad(out.sum(), (q, k, v))
        for found, value in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(found, value)
        dq.fill_(7.0)
        assert (storage == 7.0).all()


def cuda_call(q: Tensor, k: Tensor, v: Tensor) -> tuple[cuda.Operands, cuda.Options]:
    from fused_attn.ops.attention.problem import make_options

    sizes = {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2], "head_dim": q.shape[3]}
    return cuda.Operands(q, k, v), make_options(**sizes)


def test_tensor_maps_are_encoded_once() -> None:
    q, k, v = (torch.randn(1, 2, 50, 64, device=DEVICE).half() for _ in range(3))
    out = torch.empty_like(q)
    options = cuda_call(q, k, v)[1]

    def encoded(*tensors: Tensor) -> int:
        before = cuda_runtime.module().encoded_tensor_maps()
        cuda.forward(cuda.Operands(*tensors), options, out, None)
        return cuda_runtime.module().encoded_tensor_maps() - before

    assert encoded(q, k, v) == 4  # with that of out
    assert encoded(q, k, v) == 0
    moved = k.clone()
    assert encoded(q, moved, v) == 1
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert encoded(q, strided, v) == 1
    assert encoded(q, k, v) == 0
    # The copy engine moves 16 bits, whatever they mean.
    assert encoded(*[x.view(torch.bfloat16) for x in (q, k, v)]) == 0


def test_tensor_maps_may_be_asked_for_by_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    if DEVICE.type == "cpu":
        pytest.skip("the emulator runs one kernel at a time")
    inputs = [[randn(1, 2, 64 + n, 64).detach() for _ in range(3)] for n in range(32)]
    expected = [attention(*x, backend="cuda") for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: attention(*x, backend="cuda"), inputs * 4))
    for i, out in enumerate(found):
        assert torch.equal(out, expected[i % len(expected)])


@on_a_gpu
def test_graph_capture_and_replay(deterministic: bool) -> None:
    q, k, v = (randn(2, 4, 300, 128) for _ in range(3))

    def step() -> tuple[Tensor, ...]:
        out = attention(q, k, v, causal=True, backend="cuda")
        return (out, *torch.autograd.grad(out.float().sum(), (q, k, v)))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected)


@on_a_gpu
def test_streams_do_not_disturb_each_other() -> None:
    inputs = [[randn(2, 4, 700, 64) for _ in range(3)] for _ in range(4)]

    def step(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        out = attention(*tensors, causal=True, backend="cuda")
        return (out, *torch.autograd.grad(out.float().sum(), tensors))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = [step(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        found = []
        for stream, tensors in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(tensors))
        torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    q, k, v = (torch.randn(2, 4, 100, 64, device="cuda:1").half() for _ in range(3))
    with torch.cuda.device(0):
        found = attention(q, k, v, backend="cuda")
    with torch.cuda.device(1):
        assert torch.equal(found, attention(q, k, v, backend="cuda"))
