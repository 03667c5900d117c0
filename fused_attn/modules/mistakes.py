"""Everyday mistakes with the modules: what to say, and the line with the way out."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..runtime import hints

# What an argument is called elsewhere, and the names that it may have here.
_PADDING = ("src_key_padding_mask", "key_padding_mask", "tgt_key_padding_mask")
_MASK = ("src_mask", "attn_mask", "tgt_mask", "mask")
_CAUSAL = ("is_causal", "tgt_is_causal")
_ELSEWHERE = {
    **dict.fromkeys((*_PADDING, "padding_mask", "src_padding_mask", "src_padding"), _PADDING),
    **dict.fromkeys((*_MASK, "attention_bias", "attn_bias", "bias"), _MASK),
    **dict.fromkeys((*_CAUSAL, "causal", "src_is_causal"), _CAUSAL),
}

P = ParamSpec("P")
R = TypeVar("R")


def names_checked(forward: Callable[P, R]) -> Callable[P, R]:
    """A `forward` that names what was probably meant by an argument which it does not have."""
    known = frozenset(inspect.signature(forward).parameters)

    @functools.wraps(forward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                _refuse_name(type(args[0]).__name__, name, known)
        return forward(*args, **kwargs)

    return checked


def warn_of_upper_left(queries: int, keys: int) -> None:
    """Tell of a diagonal that starts at the first key, though the queries may be the last ones."""
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        f"`is_causal` with {queries} queries and {keys} keys lets the first query see the first "
        "key alone, as torch does; for queries that follow cached keys give `cache=`, or an "
        "`attn_mask`",
        stacklevel=4,
    )


def other_order(batch_first: bool) -> str:
    """The way out where sizes fit only with the batch in the other dimension."""
    reads = "(N, L, E)" if batch_first else "(L, N, E)"
    return (
        f"the module has batch_first={batch_first} and reads {reads}; "
        f"with batch_first={not batch_first} the sizes fit"
    )


def _refuse_name(module: str, name: str, known: Iterable[str]) -> NoReturn:
    choices = [each for each in _ELSEWHERE.get(name, ()) if each in known]
    hint: str | None = None
    if name == "attention_mask":
        mine = next((each for each in _PADDING if each in known), None)
        hint = f"`{mine}=attention_mask == 0`, True = padding" if mine else None
    elif choices:
        hint = f"`{choices[0]}=`" + (", True = padding" if choices[0] in _PADDING else "")
    elif name in ("need_weights", "average_attn_weights"):
        hint = "layers return no weights; their `self_attn` does where it is called by itself"
    else:
        close = hints.closest(name, sorted(known))
        hint = f"`{close}=`" if close else None
    message = f"{module}.forward() got an unexpected keyword argument {name!r}"
    raise TypeError(hints.with_hint(message, hint))


def hint_for_padding(mask: Tensor, sizes: Any) -> str | None:
    """What to do about a `key_padding_mask` of a wrong shape."""
    shape = tuple(mask.shape)
    if sizes.batched and shape == (sizes.keys, sizes.batch):
        return other_order(sizes.batch_first)
    if shape == (sizes.queries, sizes.keys):
        return "a mask of queries and keys is `attn_mask=` (`src_mask=`, `tgt_mask=` of layers)"
    if len(shape) == 4 and shape[1:3] == (1, 1):
        return "`mask[:, 0, 0]`; True = padding"
    if sizes.batched and shape == (sizes.keys,):
        return f"`mask.expand({sizes.batch}, -1)`, if it is that of all sequences"
    return None


def hint_for_attention(mask: Tensor, sizes: Any) -> str | None:
    """What to do about an `attn_mask` of a wrong shape."""
    shape, batch = tuple(mask.shape), sizes.batch
    if sizes.batched and shape in ((batch, batch), (sizes.queries * sizes.heads, batch, batch)):
        return other_order(sizes.batch_first)
    if sizes.batched and shape in ((batch, sizes.keys), (sizes.keys,)):
        return (
            "a mask of padding is `key_padding_mask=` (`src_key_padding_mask=` of layers), (N, S)"
        )
    if shape == (batch, sizes.queries, sizes.keys):
        return "`attn_mask[:, None]`, for any shape that broadcasts to (N, H, L, S) is taken"
    return None


def hint_for_mask_dtype(name: str, mask: Tensor, accepted: Iterable[Any]) -> str:
    """What to do about a mask that is neither bool nor of an accepted dtype."""
    if mask.is_floating_point():
        return f"`{name}.to({next(iter(accepted))})`"
    if name == "key_padding_mask":
        return f"`{name}.bool()` if 1 = padding, `{name} == 0` if 1 = token: True = padding"
    return f"`{name}.bool()`, True = hidden"


def hint_for_features(query: Tensor, embed_dim: int) -> str | None:
    """What to do about a query of another width than the module's."""
    if not (query.is_floating_point() or query.is_complex()):
        return "tokens are embedded first, as by `fused_attn.FusedTransformerEmbedding`"
    if query.dim() == 3 and query.shape[1] == embed_dim:
        return "features come last: `x.transpose(1, 2)`"
    return None
