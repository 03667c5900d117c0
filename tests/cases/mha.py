"""Multi-head attention spelled out: the oracle of the module tests, and their inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import FusedMultiheadAttention
from fused_attn.testing import (
    BACKWARD_FACTOR,
    FORWARD_FACTOR,
    gradients,
    largest_error,
    rounding_step,
)

N, L, S, E, H = 3, 13, 18, 32, 4


def pair(*args: Any, seed: int = 0, **kwargs: Any) -> tuple[nn.Module, FusedMultiheadAttention]:
    """torch.nn's module and ours with the same random weights, biases included."""
    torch.manual_seed(seed)
    stock = nn.MultiheadAttention(*args, **kwargs)
    for parameter in stock.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    ours = FusedMultiheadAttention(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def formula(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    average: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and weights of batch-first inputs (N, L, E), one obvious step after the other."""
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.chunk(3)
    q, k, v = (x @ w.mT for x, w in zip((query, key, value), weights, strict=True))
    if module.in_proj_bias is not None:
        q, k, v = (x + b for x, b in zip((q, k, v), module.in_proj_bias.chunk(3), strict=True))
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    bias = torch.zeros(batch, module.num_heads, seqlen_q, seqlen_k, dtype=q.dtype)
    for mask, shape in (
        (key_padding_mask, (batch, 1, 1, seqlen_k)),
        (attn_mask, None if attn_mask is None else _spread(attn_mask, batch)),
    ):
        if mask is not None:
            mask = mask.reshape(shape)
            floating = mask.is_floating_point()
            bias = bias + (mask if floating else torch.where(mask, -torch.inf, 0.0)).to(q.dtype)
    if is_causal:
        later = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).triu(1)
        bias = bias.masked_fill(later, -torch.inf)
    rows = []
    if module.bias_k is not None:
        rows.append((module.bias_k, module.bias_v))
    if module.add_zero_attn:
        rows.append((torch.zeros_like(k[:1, :1]), torch.zeros_like(v[:1, :1])))
    for extra_k, extra_v in rows:
        k = torch.cat([k, extra_k.expand(batch, -1, -1)], dim=1)
        v = torch.cat([v, extra_v.expand(batch, -1, -1)], dim=1)
        bias = torch.cat([bias, torch.zeros_like(bias[..., :1])], dim=-1)
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / module.head_dim**0.5 + bias
    dead = scores == -torch.inf
    p = torch.softmax(scores.masked_fill(dead.all(-1, keepdim=True), 0.0), -1)
    p = p.masked_fill(dead, 0.0)
    out = (p @ v).transpose(1, 2).flatten(-2) @ module.out_proj.weight.mT
    if module.out_proj.bias is not None:
        out = out + module.out_proj.bias
    return out, p.mean(1) if average else p


def _spread(mask: Tensor, batch: int) -> tuple[int, ...]:
    if mask.dim() == 2:
        return (1, 1, *mask.shape)
    return tuple(mask.shape) if mask.dim() == 4 else (batch, -1, *mask.shape[1:])


@dataclass
class Call:
    """Inputs of one call, batch first, and how the module is built."""

    module: dict[str, Any] = field(default_factory=dict)
    kdim: int = E
    vdim: int = E
    self_attention: bool = False
    padding: str | None = None
    mask: str | None = None
    is_causal: bool = False
    average: bool = True
    seed: int = 0

    def modules(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
        kdim = {} if self.kdim == E and self.vdim == E else {"kdim": self.kdim, "vdim": self.vdim}
        settings = {"batch_first": True, **kdim, **self.module}
        return pair(E, H, seed=self.seed, dtype=dtype, **settings)

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
        torch.manual_seed(self.seed)
        query = torch.randn(N, L, E, dtype=dtype)
        if self.self_attention:
            key = value = query
        else:
            key = torch.randn(N, S, self.kdim, dtype=dtype)
            value = key if self.vdim == self.kdim else torch.randn(N, S, self.vdim, dtype=dtype)
        keys = key.shape[1]
        return {
            "query": query,
            "key": key,
            "value": value,
            "key_padding_mask": _padding(self.padding, keys, dtype),
            "attn_mask": _mask(self.mask, L, keys, dtype),
        }


def _padding(kind: str | None, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    lengths = torch.tensor([keys, keys - 2, 1])
    padded = torch.arange(keys) >= lengths[:, None]
    if kind == "bool":
        return padded
    return torch.where(padded, -torch.inf, torch.randn(N, keys)).to(dtype)


def _mask(kind: str | None, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    heads, name = {
        "2d": ((), "bool"),
        "3d": ((N * H,), "bool"),
        "4d": ((N, 1), "bool"),
        "2d float": ((), "float"),
        "3d float": ((N * H,), "float"),
        "4d float": ((1, H), "float"),
    }[kind]
    if name == "float":
        return torch.randn(*heads, queries, keys, dtype=dtype)
    hidden = torch.rand(*heads, queries, keys) < 0.4
    hidden[..., 0] = False  # every row sees a key
    return hidden


def check(call: Call, dtype: torch.dtype = torch.float32, need_weights: bool = True) -> None:
    """Output, weights and every gradient of ours within the budget of torch.nn's own error."""
    stock, ours = call.modules(dtype)
    inputs = call.inputs(dtype)
    oracle_module = copy.deepcopy(stock).double()
    plain = copy.deepcopy(stock)

    def torch_nn(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        if call.is_causal and arguments["attn_mask"] is None:
            arguments["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(L, dtype=dtype)
        elif arguments["attn_mask"] is not None and arguments["attn_mask"].dim() == 4:
            spread = arguments["attn_mask"].expand(N, H, -1, -1)
            arguments["attn_mask"] = spread.flatten(0, 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Support for mismatched")
            return plain(**arguments, need_weights=need_weights, average_attn_weights=call.average)

    def run(kind: str) -> tuple[list[Tensor | None], list[Tensor], list[str]]:
        module = {"ours": ours, "plain": plain, "oracle": oracle_module}[kind]
        arguments = _leaves(inputs, double=kind == "oracle")
        if kind == "ours":
            out, weights = ours(
                **arguments,
                need_weights=need_weights,
                average_attn_weights=call.average,
                is_causal=call.is_causal,
            )
        elif kind == "plain":
            out, weights = torch_nn(**arguments)
        else:
            out, weights = formula(
                module, **arguments, is_causal=call.is_causal, average=call.average
            )
            weights = weights if need_weights else None
        leaves = {n: x for n, x in arguments.items() if x is not None and x.requires_grad}
        leaves |= dict(module.named_parameters())
        return [out, weights], gradients([out, weights], list(leaves.values())), list(leaves)

    results = {kind: run(kind) for kind in ("ours", "plain", "oracle")}
    assert (results["ours"][0][1] is None) == (not need_weights)
    outputs = [[x for x in results[kind][0] if x is not None] for kind in results]
    assert_group_within_budget(["output", "weights"], *outputs, FORWARD_FACTOR)
    grads = [results[kind][1] for kind in results]
    assert_group_within_budget(results["ours"][2], *grads, BACKWARD_FACTOR)


def assert_group_within_budget(
    names: Sequence[str],
    ours: Sequence[Tensor],
    plain: Sequence[Tensor],
    oracle: Sequence[Tensor],
    factor: float,
) -> None:
    """The error budget over all results of a call at once, each relative to its magnitude.

    The largest error of one small tensor is a matter of luck, ours and plain's alike.
    """
    worst = {"ours": 0.0, "plain": 0.0}
    guilty = ""
    for name, x, y, exact in zip(names, ours, plain, oracle, strict=False):
        assert x.shape == exact.shape, f"{name}: shape {x.shape}, expected {exact.shape}"
        assert x.dtype == y.dtype, f"{name}: dtype {x.dtype}, expected {y.dtype}"
        magnitude = float(exact.abs().max()) if exact.numel() else 0.0
        if magnitude == 0.0:
            assert not x.any(), f"{name}: expected zeros"
            continue
        error = largest_error(x, exact) / magnitude
        if error > worst["ours"]:
            worst["ours"], guilty = error, name
        worst["plain"] = max(worst["plain"], largest_error(y, exact) / magnitude)
    allowed = factor * worst["plain"] + rounding_step(ours[0].dtype, 1.0)
    assert worst["ours"] <= allowed, (
        f"{guilty}: relative error {worst['ours']:.3g}, allowed {allowed:.3g} "
        f"({factor:g} x plain {worst['plain']:.3g} + one rounding step)"
    )


def _leaves(inputs: dict[str, Tensor | None], double: bool) -> dict[str, Tensor | None]:
    """Fresh leaves that require gradients; one tensor given twice stays one tensor."""
    made: dict[int, Tensor] = {}
    leaves: dict[str, Tensor | None] = {}
    for name, x in inputs.items():
        if x is None or not x.is_floating_point():
            leaves[name] = x
            continue
        if id(x) not in made:
            made[id(x)] = (x.double() if double else x).detach().clone().requires_grad_()
        leaves[name] = made[id(x)]
    return leaves
