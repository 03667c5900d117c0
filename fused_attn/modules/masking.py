"""0 at padding where nothing is packed, so that the answer there does not depend on the path.

The rows of padding come out 0, and so do their gradients. They are cleared on the way in as well:
a NaN stored there would reach gradients of weights by way of 0 · NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEFT_TO_CALLER = "_fused_attn_left_to_caller"  # attribute of a mask


def hidden(x: Tensor, key_padding_mask: Tensor | None, owner: nn.Module) -> Tensor | None:
    """(N, L, 1), (L, N, 1) or (L, 1) bool, as x lies: True = padding.

    None where there is no mask, or one that does not fit x: the attention says what is wrong.
    A floating mask hides where it is -inf.

    Args:
        owner: the layer or stack, for its layout.
    """
    mask = key_padding_mask
    if not isinstance(mask, Tensor) or mask.dim() != x.dim() - 1 or mask.dim() not in (1, 2):
        return None
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            return None
        mask = mask == -torch.inf
    if mask.dim() == 2:
        batch_first = _is_batch_first(owner, x, mask)
        if batch_first is None:
            return None
        if not batch_first:
            mask = mask.transpose(0, 1)
    return mask[..., None] if mask.shape == x.shape[:-1] else None


def hidden_in_cache(x: Tensor, key_padding_mask: Tensor | None, owner: nn.Module) -> Tensor | None:
    """`hidden` of x, the last positions of those that the mask (N, S) or (S) is of."""
    if not isinstance(key_padding_mask, Tensor):
        return None
    batch_first = x.dim() == 3 and getattr(getattr(owner, "self_attn", None), "batch_first", True)
    new = x.shape[1 if batch_first else 0]
    return hidden(x, key_padding_mask[..., max(key_padding_mask.shape[-1] - new, 0) :], owner)


def clear(x: Tensor, rows: Tensor | None, all_known: bool) -> Tensor:
    """x without what is stored at padding.

    Args:
        rows: of `hidden`.
        all_known: nothing that follows looks at the padding. Where something may, finite numbers
            stay, which torch.nn would hand it as well.
    """
    if rows is None:
        return x
    return x.masked_fill(rows if all_known else rows & ~x.isfinite(), 0.0)


def zero(x: Tensor, rows: Tensor | None) -> Tensor:
    """x with 0 at padding; `rows` of `hidden`."""
    return x if rows is None else x.masked_fill(rows, 0.0)


def leave_to_caller(key_padding_mask: Tensor | None) -> Tensor | None:
    """The mask as a stack hands it to its layers: the stack itself sees to the padding.

    What lies at padding between the layers is thereby what torch.nn has there, for modules that
    look across positions. It is a mark on the mask since a layer has torch.nn's arguments alone.
    """
    if not isinstance(key_padding_mask, Tensor):  # none, or a mistake that attention tells of
        return key_padding_mask
    marked = key_padding_mask.view_as(key_padding_mask)
    setattr(marked, _LEFT_TO_CALLER, True)
    return marked


def is_left_to_caller(key_padding_mask: Tensor | None) -> bool:
    """True for a mask of `leave_to_caller`."""
    return getattr(key_padding_mask, _LEFT_TO_CALLER, False)


def _is_batch_first(owner: nn.Module, x: Tensor, mask: Tensor) -> bool | None:
    """The layout of `owner`; where no module in it says so, the one that fits; None: unknown."""
    said = getattr(getattr(owner, "self_attn", None), "batch_first", None)
    if said is None:
        all_said = (getattr(module, "batch_first", None) for module in owner.modules())
        said = next((each for each in all_said if isinstance(each, bool)), None)
    if said is not None:
        return said
    fits = mask.shape == x.shape[:2], mask.shape == (x.shape[1], x.shape[0])
    return fits[0] if fits[0] != fits[1] else None
