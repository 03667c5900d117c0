"""What encoder and decoder layers share: whether they may run packed, and if not, why not."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..ops import dispatch
from . import padding, token_wise
from .packing import Padding
from .residual import has_hooks

NO_MASK = "no padding mask"
CACHE = "a cache is used"
OFF = "`pack_padding` is False"


class PackableLayer(nn.Module):
    """Base of the layers that can run packed.

    Attributes:
        pack_padding: run packed where that is possible, and give 0 at padding everywhere. False:
            never packed, and torch.nn's numbers at padding.
    """

    pack_padding: bool = True
    _ATTENTIONS: tuple[str, ...] = ()  # names of the children
    _TOKEN_WISE: tuple[str, ...] = ()  # of all other children, and of the activation

    def is_packable(self) -> bool:
        """True if `forward_packed` computes what the sub-modules say, and calls all that hooks."""
        return self.pack_padding and self._is_plain()

    def is_known(self) -> bool:
        """True if nothing in the layer looks at positions that the masks hide."""
        return (
            self._is_own_class()
            and all(padding.is_known_attention(getattr(self, name)) for name in self._ATTENTIONS)
            and token_wise.first_other(self, self._TOKEN_WISE) is None
        )

    def why_not_packable(self, path: str = "") -> str:
        """What to tell a user of a layer that is not packable; `path` comes before names."""
        if not self.pack_padding:
            return OFF
        if not self._is_own_class():
            name = f"`{path[:-1]}`" if path else "it"
            return f"{name} is a {type(self).__name__}"
        if has_hooks(self):
            return "a hook on " + (f"`{path[:-1]}`" if path else "the layer")
        for name in self._ATTENTIONS:
            attention: Any = getattr(self, name)
            if not padding.is_plain_attention(attention):
                return padding.why_not_attention(path + name, attention)
        other = token_wise.first_other(self, self._TOKEN_WISE)
        return "" if other is None else token_wise.why_not(path + other, getattr(self, other))

    def _is_plain(self) -> bool:
        return (
            self._is_own_class()
            and not has_hooks(self)
            and all(padding.is_plain_attention(getattr(self, name)) for name in self._ATTENTIONS)
            and token_wise.first_other(self, self._TOKEN_WISE) is None
        )

    def _is_own_class(self) -> bool:
        """True for an instance of our class itself: a subclass may do anything."""
        raise NotImplementedError


def note_packed(module: nn.Module, rows: Padding, memory: Padding | None = None) -> None:
    """Tell whoever watches that `module` runs packed, and how much is left."""
    if dispatch.is_watched():
        text = f"{type(module).__name__} packed: {_real(rows)} positions are real"
        dispatch.note(text if memory is None else f"{text}, {_real(memory)} of the memory")


def note_nested(module: Any, packed: bool) -> None:
    """Tell whoever watches how `module` runs NestedTensors."""
    if dispatch.is_watched():
        how = (
            "packed: as the NestedTensor is" if packed else "not packed: the NestedTensor is padded"
        )
        dispatch.note(f"{type(module).__name__} {how}")


def _real(rows: Padding) -> str:
    total = rows.shape.numel()
    return f"{total if rows.rows is None else rows.rows.numel()} of {total}"


def note_not_packed(module: Any, why: str) -> None:
    """Tell whoever watches why `module` does not run packed.

    Args:
        why: "" if it is because of what is in it.
    """
    if dispatch.is_watched():
        if not module.pack_padding:
            why = OFF
        dispatch.note(f"{type(module).__name__} not packed: {why or module.why_not_packable()}")
