"""A switch that warns, once a kind, where a call is right and its user likely wrong.

Off by default, and free then: whoever might warn looks at `enabled` first. On, it reads masks back
from the device. Nothing is looked at while somebody compiles, traces or transforms.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import higher_order

VARIABLE = "FUSED_ATTN_DEBUG"
enabled = os.environ.get(VARIABLE) == "1"

_warned: set[str] = set()
_PACKAGE = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_FUNCTIONS = "True = visible in functions: `~mask` if yours is torch.nn's, True = hidden"
_MODULES = "True = hidden in modules, as in torch.nn: `~mask` if yours says True = visible"
_FAR = 4  # so many times more heads than positions


def debug(on: bool = True) -> None:
    """Warn, once a kind, where a call is right and its user likely wrong.

    Kinds: a whole batch element that sees no key (an inverted mask); tensors (B, L, H, D) taken for
    (B, H, L, D); `FusedTransformer` given padding of `src` and none of the memory. The environment
    variable FUSED_ATTN_DEBUG=1 switches it on from the start.

    Args:
        on: False switches it off again. True lets each kind warn again.

    Raises:
        TypeError: `on` is no bool.
    """
    global enabled
    if not isinstance(on, bool):
        raise TypeError(f"`on` must be a bool, got {type(on).__name__} {on!r}")
    enabled = on
    _warned.clear()


def look_at_call(operands: Any, layout: str) -> None:
    """Warn of a call of attention; its `operands` need not be checked yet.

    Args:
        layout: "bhld" where the user may have taken it for another.
    """
    q, k = operands.q, operands.k
    if _cannot_read(q, k) or q.dim() != 4 or k.dim() != 4:
        return
    if operands.cu_seqlens_q is not None:
        _look_at_lengths(operands)
        return
    if layout == "bhld":
        _look_at_layout(q, k)
    visible = []
    if operands.mask is not None and operands.mask.dtype == torch.bool:
        visible.append(operands.mask)
    if operands.bias is not None:
        visible.append(operands.bias != -torch.inf)
    if operands.key_padding_mask is not None and operands.key_padding_mask.dtype == torch.bool:
        visible.append(operands.key_padding_mask[:, None, None])
    if operands.key_lengths is not None:
        positions = torch.arange(k.shape[2], device=k.device)
        visible.append((positions < operands.key_lengths[:, None])[:, None, None])
    if visible and k.shape[2]:
        _look_at_masks("a call of attention", visible, q.shape[0], _FUNCTIONS)


def look_at_padding(module: object, key_padding_mask: object) -> None:
    """Warn of a `key_padding_mask` of a module, (N, S) or (S,), that hides whole sequences."""
    if not isinstance(key_padding_mask, Tensor) or _cannot_read(key_padding_mask):
        return
    mask = key_padding_mask
    if mask.dim() not in (1, 2) or mask.shape[-1] == 0:
        return
    visible = ~mask if mask.dtype == torch.bool else mask != -torch.inf
    visible = visible.reshape(-1, 1, 1, mask.shape[-1])
    _look_at_masks(type(module).__name__, [visible], visible.shape[0], _MODULES)


def look_at_masks(module: object, visible: Iterable[Tensor | None], batch: int) -> None:
    """Warn of masks of a module, True = visible, broadcastable to (batch, H, L, S)."""
    given = [mask for mask in visible if mask is not None]
    if given and not _cannot_read(*given) and all(mask.shape[-1] for mask in given):
        _look_at_masks(type(module).__name__, given, batch, _MODULES)


def look_at_memory(src_padding: object, memory_padding: object) -> None:
    """Warn of a model that is told of padding in its source, and whose decoder is not."""
    if src_padding is not None and memory_padding is None:
        _warn(
            "memory",
            "FusedTransformer was given `src_key_padding_mask` and no `memory_key_padding_mask`: "
            "the decoder attends to the padding of the source",
            "`memory_key_padding_mask=src_key_padding_mask`",
        )


def _look_at_layout(q: Tensor, k: Tensor) -> None:
    heads, longest = q.shape[1], max(q.shape[2], k.shape[2])
    # One position against many heads is a first step of generation.
    if k.shape[2] > 1 and heads >= 16 and heads >= _FAR * longest:
        _warn(
            "layout",
            f"attention of q {tuple(q.shape)}, (B, H, L, D), has {heads} heads of {longest} "
            "positions at most",
            '`layout="blhd"`, or `x.transpose(1, 2)`, if the tensors are (B, L, H, D)',
        )


def _look_at_lengths(operands: Any) -> None:
    lengths = [
        cu_seqlens.diff() if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 else None
        for cu_seqlens in (operands.cu_seqlens_q, operands.cu_seqlens_k)
    ]
    queries, keys = lengths
    if queries is None or keys is None or queries.shape != keys.shape:
        return
    blind = ((queries > 0) & (keys == 0)).nonzero().flatten().tolist()
    if blind:
        hint = "`cu_seqlens_k` holds the start of each sequence's keys, and the end"
        _warn_of_blind("a call of attention_varlen", blind, hint)


def _look_at_masks(who: str, visible: list[Tensor], batch: int, hint: str) -> None:
    if any(mask.dim() != 4 for mask in visible):
        return
    try:
        together = visible[0]
        for mask in visible[1:]:
            together = together & mask
    except RuntimeError:  # sizes that do not fit are told of by the checks
        return
    seen = together.flatten(1).any(dim=1)
    if seen.shape[0] == 1:
        seen = seen.expand(batch)
    blind = (~seen).nonzero().flatten().tolist()
    if blind:
        _warn_of_blind(who, blind, hint)


def _warn_of_blind(who: str, blind: list[int], hint: str) -> None:
    shown = ", ".join(map(str, blind[:5])) + (", ..." if len(blind) > 5 else "")
    text = f"{who}: all of batch element {shown} is hidden by the masks, so its attention is 0"
    _warn("blind", text, hint)


def _warn(kind: str, text: str, hint: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"{text}\nhint: {hint}", UserWarning, stacklevel=_level_of_user())


def _level_of_user() -> int:
    """`stacklevel` of the first caller that is neither of this package nor of torch."""
    frame, level = sys._getframe(1), 1  # that of `_warn`
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH)):
        frame, level = frame.f_back, level + 1
    return level


def _cannot_read(*tensors: Any) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or higher_order.needs_formula()
        or any(not isinstance(x, Tensor) or x.is_meta or x.is_nested for x in tensors)
        or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
    )
