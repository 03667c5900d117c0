"""Parity of one's own models and calls, for one's own CI."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .budget import DRAWS, check_against_oracle, gradients


def assert_parity(
    model: nn.Module,
    fused: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any],
    *,
    draws: int = DRAWS,
) -> None:
    """Hold `fused(*inputs)` and every gradient against `model` in float64: for your own CI.

        fused = copy.deepcopy(model)
        fused_attn.fuse(fused)
        fused_attn.testing.assert_parity(model, fused, (tokens, mask))

    Outputs may be a tensor, or tensors in tuples, lists, dictionaries and dataclasses of
    transformers. Gradients are those of the parameters and of the floating inputs, but of those
    with a -inf: these are masks.

    Args:
        model: the yardstick, of plain PyTorch; both models must be in one mode, without dropout.
        fused: the model under test, with parameters of the same names and values.
        inputs: arguments of both, by position or by name.
        draws: how often the error of `model` is looked at, each time with inputs moved to
            neighbouring numbers: in a small model it is partly luck.

    Raises:
        AssertionError: an output or a gradient is over the budget; the message names it, its
            error and what is allowed.
        ValueError: the models have other parameters, or draw dropout.
    """
    _check_models(model, fused)
    positional = list(inputs) if not isinstance(inputs, Mapping) else []
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    given: dict[str, Any] = {f"input {n}": x for n, x in enumerate(positional)}
    given |= {f"input {name}": x for name, x in named.items()}
    others = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
    tensors = {name: x.detach() for name, x in given.items() if isinstance(x, Tensor)}
    tensors |= {f"parameter {name}": p.detach() for name, p in model.named_parameters()}
    for x in tensors.values():
        x.requires_grad_(x.is_floating_point() and not bool((x == -torch.inf).any()))
    tensors |= {f"buffer {name}": b.detach() for name, b in model.named_buffers()}

    def run(module: nn.Module, **tensors: Tensor) -> list[Tensor]:
        state = {
            name.partition(" ")[2]: x
            for name, x in tensors.items()
            if name.startswith(("parameter ", "buffer "))
        }
        args = {**tensors, **others}
        by_place = tuple(args[f"input {n}"] for n in range(len(positional)))
        by_name = {name: args[f"input {name}"] for name in named}
        result = torch.func.functional_call(module, state, by_place, by_name)
        return [x for x in _tensors_in(result) if x.is_floating_point()]

    with torch.no_grad():
        number = len(run(model, **tensors))
    check_against_oracle(
        functools.partial(run, fused),
        functools.partial(run, model),
        tensors,
        [f"output {n}" for n in range(number)],
        _statistics_noise,
        draws,
    )


def _statistics_noise(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[float]:
    """What one rounding of the statistics that a backward starts from comes to.

    They are stored in float32. Where gradients cancel, as in a softmax of one key, plain PyTorch is
    exact by luck.
    """
    found = [float(g.abs().max()) if g.numel() else 0.0 for g in gradients(outputs, inputs)]
    noise = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * max(found, default=0.0)
    return [*[0.0] * len(outputs), *[noise] * len(inputs)]


def assert_matches_reference(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Hold a function of fused_attn and its gradients against its formula in float64.

        fused_attn.testing.assert_matches_reference(fused_attn.attention, q, k, v, causal=True)

    Args:
        function: one that takes `backend=`; the call runs as it is, and by the reference.
        args, options: of the call; gradients of the floating tensors that require them are checked.

    Raises:
        AssertionError: an output or a gradient is over the budget of this file.
    """
    given = {**{f"argument {n}": x for n, x in enumerate(args)}, **options}
    others = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
    # One tensor may stand for several arguments: each gets a gradient of its own.
    tensors = {
        name: x.detach().requires_grad_(x.requires_grad)
        for name, x in given.items()
        if isinstance(x, Tensor)
    }

    def run(backend: dict[str, str], **tensors: Tensor) -> list[Tensor]:
        all_given = {**tensors, **others, **backend}
        by_place = [all_given.pop(f"argument {n}") for n in range(len(args))]
        return _tensors_in(function(*by_place, **all_given))

    with torch.no_grad():
        number = len(run({}, **tensors))
    check_against_oracle(
        functools.partial(run, {}),
        functools.partial(run, {"backend": "reference"}),
        tensors,
        [f"output {n}" for n in range(number)],
        _statistics_noise,
    )


def _check_models(model: nn.Module, fused: nn.Module) -> None:
    mine, theirs = (dict(m.named_parameters()) for m in (fused, model))
    if mine.keys() != theirs.keys():
        other = sorted(mine.keys() ^ theirs.keys())
        raise ValueError(f"`fused` must have the parameters of `model`; only one has {other[:4]}")
    for name, p in theirs.items():
        if not torch.equal(mine[name], p):
            raise ValueError(f"`fused` must have the values of `model`, {name} differs")
    for module in (*model.modules(), *fused.modules()):
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError("`model` and `fused` must be without dropout: call `.eval()` first")


def _tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, (tuple, list)):
        return [x for each in result for x in _tensors_in(each)]
    return []
