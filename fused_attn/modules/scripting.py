"""What torch.jit.script gets from modules whose forward is no TorchScript."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """Mixin: refuses torch.jit.script with a clear message."""

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks a module for before it compiles it."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}\nhint: use torch.compile or "
            "torch.export, or put torch.nn's modules back first with fused_attn.unfuse(model)"
        )
