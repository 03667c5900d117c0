"""Every model that calls torch's `scaled_dot_product_attention` gets the kernels of this package.

    from fused_attn.integrations import torch_sdpa

    torch_sdpa.activate()          # until torch_sdpa.restore()
    with torch_sdpa.activated():   # or for a while
        model(x)

Two things are put in place, because each misses callers that the other one finds:

* torch's own function `torch.nn.functional.scaled_dot_product_attention`. Who looks it up there
  when he calls it (torch.nn, timm, diffusers, transformers' "sdpa") gets
  `fused_attn.scaled_dot_product_attention`, with everything that it can do.
* torch's operator behind that function on a CPU, through torch's registry of flash attention
  (`torch.nn.attention.activate_flash_attention_impl`). So those are found who kept torch's function
  under a name of their own, and graphs that were compiled before. torch brings only part of its
  calls there: no dropout, four dimensions, v as wide as q, no gradient of the mask. The rest of the
  calls by a kept name stay torch's.

What our kernels refuse, and tensors that torch has classes of its own for (DTensor, NestedTensor),
runs torch's code as before.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from typing import Any

import torch
import torch.nn.attention as registry
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function

from .. import attention, attention_backward
from ..ops.attention import torch_sdpa as torch_backend
from ..ops.attention.sdpa import scaled_dot_product_attention
from ..ops.dispatch import UnsupportedError
from .switch import for_a_while

__all__ = ["activate", "activated", "is_active", "restore"]

NAME = "fused_attn"  # in torch's registry
_lock = threading.Lock()
_state: _State | None = None


def activate() -> None:
    """Put our attention in the place of torch's, in this process; again does nothing.

    Random numbers of dropout come from `fused_attn`'s generator rule (seed and offset drawn from
    torch's generator), so a seed gives other masks than torch's own function does.

    Raises:
        RuntimeError: this torch lacks what is needed to take it back.
    """
    global _state
    with _lock:
        if _state is None:
            _state = _State()


def restore() -> None:
    """Put back what was there before `activate`; without it does nothing.

    Raises:
        RuntimeError: somebody else replaced torch's function since; nothing is changed then.
    """
    global _state
    with _lock:
        if _state is not None:
            _state.restore()
            _state = None


def is_active() -> bool:
    return _state is not None


def activated() -> contextlib.AbstractContextManager[None]:
    """`activate()` for the body of a `with`; it leaves active what was active before."""
    return for_a_while(is_active, activate, restore)


class _State:
    """What was there before, to be put back."""

    def __init__(self) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise RuntimeError(
                f"torch_sdpa needs `torch.library.get_kernel`, which torch {torch.__version__} "
                "has not; call `fused_attn.scaled_dot_product_attention` by name instead"
            )
        self.function = F.scaled_dot_product_attention
        self.implementation = registry.current_flash_attention_impl()
        registry.register_flash_attention_impl(NAME, register_fn=_Kernels)
        registry.activate_flash_attention_impl(NAME)
        self.ours = _in_place_of(self.function)
        F.scaled_dot_product_attention = self.ours

    def restore(self) -> None:
        if F.scaled_dot_product_attention is not self.ours:
            raise RuntimeError(
                "`torch.nn.functional.scaled_dot_product_attention` was replaced after "
                f"`activate()`, by {F.scaled_dot_product_attention!r}; take that back first"
            )
        F.scaled_dot_product_attention = self.function
        if registry.current_flash_attention_impl() == NAME:
            registry.restore_flash_attention_impl()
            if self.implementation is not None:
                registry.activate_flash_attention_impl(self.implementation)


def _in_place_of(stock: Any) -> Any:
    """Our function under torch's name, which falls back to `stock`."""

    @functools.wraps(scaled_dot_product_attention)
    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: Any = {"scale": scale, "enable_gqa": enable_gqa}
        if _are_ours((query, key, value, attn_mask)):
            try:
                return scaled_dot_product_attention(
                    query, key, value, attn_mask, dropout_p, is_causal, **options
                )
            except UnsupportedError:  # torch has it
                pass
        return stock(query, key, value, attn_mask, dropout_p, is_causal, **options)

    return sdpa


def _are_ours(tensors: tuple[Any, ...]) -> bool:
    """False for what has rules of its own: torch's subclasses, other devices."""
    if has_torch_function(tensors):
        return False
    return all(not isinstance(x, Tensor) or x.device.type in ("cpu", "cuda") for x in tensors)


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Kernels:
    """Ours in the place of torch's CPU kernels; what torch's registry calls a handle."""

    def __init__(self) -> None:
        forward = torch.library.get_kernel(_FORWARD, "CPU")
        backward = torch.library.get_kernel(_BACKWARD, "CPU")
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # that a kernel is replaced is what was asked for
            warnings.simplefilter("ignore")
            for operator, ours, theirs in (
                (_FORWARD, _forward, forward),
                (_BACKWARD, _backward, backward),
            ):
                self._library.impl(
                    operator._schema.name.removeprefix("aten::"),
                    functools.partial(_or_theirs, ours, theirs),
                    "CPU",
                    with_keyset=True,
                    allow_override=True,
                )

    def remove(self) -> None:
        self._library._destroy()


def _or_theirs(ours: Any, theirs: Any, keys: Any, *args: Any, **options: Any) -> Any:
    """Our kernel, or torch's where it was asked for by name or ours refuses the call."""
    if not torch_backend.is_running():
        try:
            with torch.no_grad():
                return ours(*args, **options)
        except UnsupportedError:
            pass
    return theirs.call_boxed(keys, *args, **options)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out in query's strides and lse laid out (B, L, H): compiled graphs rely on both."""
    if dropout_p:
        raise UnsupportedError("torch's CPU operator has no dropout")
    out, lse = attention(
        query.detach(),
        key.detach(),
        value.detach(),
        causal=is_causal,
        scale=scale,
        return_lse=True,
        out=torch.empty_like(query),
        **_mask_or_bias(attn_mask),
    )
    return out, _laid_out(lse, (0, 2, 1))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk and dv laid out (B, L, H, D), as torch's are."""
    grads = attention_backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp.contiguous(),
        needs=("q", "k", "v"),
        causal=is_causal,
        scale=scale,
        **_mask_or_bias(attn_mask),
    )
    return tuple(_laid_out(grad, (0, 2, 1, 3)) for grad in grads[:3] if grad is not None)


def _mask_or_bias(attn_mask: Tensor | None) -> dict[str, Any]:
    if attn_mask is None:
        return {}
    return {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask.detach()}


def _laid_out(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tensor with its dimensions in this order in memory; copied only if it is not so."""
    if tensor.permute(order).is_contiguous():
        return tensor
    return torch.empty_permuted(
        tensor.shape, order, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)
