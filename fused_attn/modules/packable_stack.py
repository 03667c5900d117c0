"""What encoder and decoder stacks share: whether all of their layers may run packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import token_wise
from .packable import PackableLayer


class PackPadding(nn.Module):
    """`pack_padding` of a module that holds layers: that of all of them."""

    _pack_padding: bool = True

    @property
    def pack_padding(self) -> bool:
        """True if padding is packed, and 0 comes out there; False: torch.nn's numbers."""
        return self._pack_padding and all(layer.pack_padding for layer in _layers_of(self))

    @pack_padding.setter
    def pack_padding(self, value: bool) -> None:
        self._pack_padding = value
        for module in self.modules():
            if isinstance(module, PackableLayer):
                module.pack_padding = value
            elif isinstance(module, PackPadding):
                module._pack_padding = value


class PackableStack(PackPadding):
    """Base of the stacks that can run packed."""

    layers: Any
    norm: Any
    _LAYER_CLASS: type[PackableLayer] = PackableLayer

    def is_packable(self) -> bool:
        """True if all layers are packable and of one layout, and the norm is token-wise."""
        layers = self.layers
        return (
            len(layers) > 0
            and all(self._is_packable_layer(layer) for layer in layers)
            and self.has_known_norm()
        )

    def is_known(self) -> bool:
        """True if nothing in the stack looks at positions that the masks hide."""
        return self.has_known_norm() and all(
            isinstance(layer, self._LAYER_CLASS) and layer.is_known() for layer in self.layers
        )

    def why_not_packable(self) -> str:
        """What to tell a user of a stack that is not packable."""
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, self._LAYER_CLASS):
                return f"`layers.{i}` is a {type(layer).__name__}"
            if not layer.is_packable():
                return layer.why_not_packable(f"layers.{i}.")
            if not self._is_packable_layer(layer):
                return "the layers differ in batch_first"
        return token_wise.why_not("norm", self.norm) if len(self.layers) else "there are no layers"

    def layout_owner(self) -> nn.Module:
        """The module that says which dimension is the batch."""
        return self.layers[0] if len(self.layers) else self

    def _is_packable_layer(self, layer: Any) -> bool:
        if not (isinstance(layer, self._LAYER_CLASS) and layer.is_packable()):
            return False
        attention: Any = layer.self_attn
        return attention.batch_first == self.layers[0].self_attn.batch_first

    def has_known_norm(self) -> bool:
        return self.norm is None or token_wise.is_token_wise(self.norm)

    def _finish(self, output: Tensor) -> Tensor:
        return output if self.norm is None else self.norm(output)


def _layers_of(module: nn.Module) -> list[PackableLayer]:
    """The layers of a stack, or of the stacks in `module`, that have a `pack_padding`."""
    if isinstance(module, PackableStack):
        return [layer for layer in module.layers if isinstance(layer, PackableLayer)]
    return [layer for layer in module.modules() if isinstance(layer, PackableLayer)]
