"""Inside `context_parallel`, ours and torch's: the whole sequence, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel as torchs_context

import fused_attn
from fused_attn.integrations.distributed import context_parallel, shard, unshard
from tests.cases.world import needs_gloo, world

pytestmark = needs_gloo

N, L, E, H = 2, 16, 16, 4


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")


def model_of(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = fused_attn.FusedTransformerEncoderLayer(
        E, H, 2 * E, dropout=0.0, batch_first=True, norm_first=True, dtype=torch.float64
    )
    layer.self_attn.rotary_base = 100.0
    return fused_attn.FusedTransformerEncoder(layer, 2, enable_nested_tensor=False)


def check_modules(rank: int) -> None:
    """Rotary encoders, embeddings with positions: outputs and gradients of one process."""
    model = model_of()
    embedding = fused_attn.FusedTransformerEmbedding(
        9, E, max_len=L, dropout=0.0, positions="learned", dtype=torch.float64
    )
    dist.broadcast(embedding.embedding.weight.data, 0)
    dist.broadcast(embedding.encoding.table.data, 0)
    tokens = torch.arange(N * L).reshape(N, L) % 9
    parameters = [*model.parameters(), *embedding.parameters()]
    expected = model(embedding(tokens), is_causal=True)
    expected.sin().sum().backward()
    grads = [p.grad.clone() for p in parameters]
    for method, order in (("ring", "zigzag"), ("ulysses", "contiguous"), ("ulysses", "zigzag")):
        for p in parameters:
            p.grad = None
        with context_parallel(order=order, method=method):
            out = model(embedding(shard(tokens, order=order)), is_causal=True)
        out.sin().sum().backward()
        close(unshard(out, order=order), expected, f"{method} {order}")
        for p, grad in zip(parameters, grads, strict=True):
            dist.all_reduce(p.grad)
            close(p.grad, grad, f"gradient, {method} {order}")
    encoding = fused_attn.SinusoidalPositionalEncoding(E, L, dtype=torch.float64)
    x = torch.zeros(N, L, E, dtype=torch.float64)
    expected = encoding(x)
    with context_parallel():
        close(unshard(encoding(shard(x))), expected, "positional encoding")


def check_functions(rank: int) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, N, H, L, 8, dtype=torch.float64)
    keep = torch.rand(N, L) < 0.6
    rng = torch.tensor([3, 4])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    cut = [shard(x, mesh["cp"], dim=2) for x in (q, k, v)]
    with context_parallel(mesh["cp"], check=False):
        for options in (
            {"causal": True},
            {"causal": True, "dropout_p": 0.5, "dropout_rng": rng},
            {"key_padding_mask": keep},
            {"sinks": torch.ones(H, dtype=torch.float64)},
        ):
            mine = dict(options)
            if "key_padding_mask" in mine:
                mine["key_padding_mask"] = shard(keep)
            found = unshard(fused_attn.attention(*cut, **mine), dim=2)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fused_attn.runtime.sequence.shards", None)
                close(found, fused_attn.attention(q, k, v, **options), str(options))
        found = fused_attn.scaled_dot_product_attention(*cut, is_causal=True)
    close(unshard(found, dim=2), fused_attn.attention(q, k, v, causal=True), "sdpa")


def check_refusals(rank: int) -> None:
    """What would take a part for the whole is refused by name."""
    x = torch.randn(1, H, 4, 8)
    layer = fused_attn.FusedTransformerEncoderLayer(8, 2, 8, batch_first=True)
    module = fused_attn.FusedMultiheadAttention(8, 2, batch_first=True)
    y = torch.randn(2, 4, 8)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    rows = torch.randn(4, 2, 8)
    padding = torch.tensor([[False] * 3 + [True], [False] * 4])
    square = torch.zeros(4, 4, dtype=torch.bool)
    varlen = fused_attn.attention_varlen
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("mask", lambda: fused_attn.attention(x, x, x, mask=~square)),
        ("bias", lambda: fused_attn.attention(x, x, x, bias=torch.zeros(4, 4))),
        ("alibi_slopes", lambda: fused_attn.attention(x, x, x, alibi_slopes=torch.ones(H))),
        ("key_lengths", lambda: fused_attn.attention(x, x, x, key_lengths=torch.tensor([2]))),
        ("chunk", lambda: fused_attn.attention(x, x, x, chunk=2)),
        ("return_weights", lambda: fused_attn.attention(x, x, x, return_weights="average")),
        ("`out` must be None", lambda: fused_attn.attention(x, x, x, out=torch.empty_like(x))),
        ("packed batch", lambda: varlen(rows, rows, rows, starts, starts, 4, 4)),
        ("packed batch", lambda: layer(y, src_key_padding_mask=padding)),
        ("mask", lambda: module(y, y, y, attn_mask=square, need_weights=False)),
        ("return_weights", lambda: module(y, y, y)),
        ("a cache", lambda: module(y, y, y, cache=fused_attn.KeyValueCache(), is_causal=True)),
        ("flex_attention", lambda: fused_attn.flex_attention(x, x, x)),
        (
            "attention_backward",
            lambda: fused_attn.attention_backward(x, x, x, x, x, torch.zeros(1, H, 4)),
        ),
    ]  # fmt: skip
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    buffer = torch.zeros(1, 8 * dist.get_world_size())
    contexts = (context_parallel(), torchs_context(mesh, buffers=[buffer], buffer_seq_dims=[1]))
    for context in contexts:
        with context:
            for word, call in cases:
                with pytest.raises(NotImplementedError, match=word):
                    call()
    assert fused_attn.attention(x, x, x, mask=~square).shape == x.shape  # all is as before


def check_torchs(rank: int) -> None:
    """torch's context and torch's shards: the numbers of the whole, balanced or not."""
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    model = model_of()
    whole = torch.randn(N, L, E, dtype=torch.float64)
    expected = model(whole, is_causal=True)
    expected.sin().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    x = whole.clone()
    with torchs_context(mesh, buffers=[x], buffer_seq_dims=[1]):
        assert x.shape[1] == L // mesh.size()
        out = model(x, is_causal=True)
        out.sin().sum().backward()
        [found] = context_parallel_unshard(mesh, [out.detach()], [1])
    close(found, expected, "torch's context_parallel")
    for p, grad in zip(model.parameters(), grads, strict=True):
        dist.all_reduce(p.grad)
        close(p.grad, grad, "gradient inside torch's context_parallel")
    close(model(whole, is_causal=True), expected, "after torch's context_parallel")


def check_reordered(rank: int) -> None:
    """torch's other way, by DTensors: its balanced order is none that DTensor can put together."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    part = torch.randn(1, H, 4, 8)
    q = DTensor.from_local(part, mesh, [Shard(2)])
    theirs._enable_context_parallel_dispatcher()
    before, theirs._cp_options.enable_load_balance = theirs._cp_options.enable_load_balance, True
    try:
        with pytest.raises(NotImplementedError, match="balanced order"):
            fused_attn.attention(q, q, q, causal=True)
    finally:
        theirs._cp_options.enable_load_balance = before
        theirs._disable_context_parallel_dispatcher()
    assert fused_attn.attention(q, q, q, causal=True).shape == q.shape


def check_compiled(rank: int) -> None:
    """What was compiled outside of a context is not the local part's attention inside."""

    @torch.compile(backend="eager")
    def attend(q: Tensor) -> Tensor:
        return fused_attn.attention(q, q, q, causal=True).sin()

    q = torch.randn(1, 2, 8, 4, dtype=torch.float64)
    dist.broadcast(q, 0)
    expected = attend(q)
    part = shard(q, dim=2)
    assert attend(part).shape == part.shape
    with context_parallel():
        close(unshard(attend(part), dim=2), expected, "compiled")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = q.clone()
    with torchs_context(mesh, buffers=[x], buffer_seq_dims=[2]):
        found = unshard(attend(x), dim=2, order="zigzag")
    close(found, expected, "compiled, in torch's context")


def test_compiled_functions() -> None:
    world(2).run(check_compiled)


def test_torchs_order_of_its_own() -> None:
    world(2).run(check_reordered)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", [check_modules, check_functions, check_refusals, check_torchs])
def test_a_part_is_never_taken_for_the_whole(check: Callable[..., None], size: int) -> None:
    world(size).run(check)
