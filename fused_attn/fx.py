"""torch.fx with our modules kept whole, as it keeps torch.nn's own."""

from __future__ import annotations

import torch.fx
from torch import nn

from .modules import DROP_INS

_LEAVES = tuple(DROP_INS.values())


class Tracer(torch.fx.Tracer):
    """`torch.fx.Tracer` that calls our modules instead of tracing into them.

    torch's own does so for modules whose class lives in torch.nn, and raises TraceError in any
    other that looks at its tensors.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def symbolic_trace(model: nn.Module) -> torch.fx.GraphModule:
    """`torch.fx.symbolic_trace(model)` with our modules as leaves."""
    return torch.fx.GraphModule(model, Tracer().trace(model), type(model).__name__)
