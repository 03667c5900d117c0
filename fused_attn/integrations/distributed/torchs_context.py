"""torch's own `context_parallel`, found by what it leaves in torch: our functions go along with it.

torch puts a function of its own in the place of `F.scaled_dot_product_attention`, and keeps mesh
and order to itself. Ours are not called through that place, so they look there: where the function
is torch's, its mesh and its order are taken; where they cannot be found, the call is refused.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from .context import Spread
from .dtensors import TORCHS_CONTEXT
from .layouts import group_of

_OLDER = "torch.distributed.tensor.experimental._attention"  # torch 2.9 and before


class _TorchsSpread(Spread):
    """As ours; but torch's users cut up their tables of positions themselves, as buffers."""

    def is_part(self, rows: int, length: int) -> bool:
        return rows == length


def shards() -> Spread | None:
    """How torch's open context spreads the sequence; None where none is open.

    Raises:
        NotImplementedError: one is open, and does not say how.
    """
    theirs = sys.modules.get(TORCHS_CONTEXT) or sys.modules.get(_OLDER)
    function: Any = F.scaled_dot_product_attention
    replaced = getattr(theirs, "_replaced_functions", {})
    if theirs is None or function not in replaced:
        return None  # somebody else's function
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    found = {name: cell.cell_contents for name, cell in cells}
    mesh = found.get("device_mesh")
    balanced = getattr(getattr(theirs, "_cp_options", None), "enable_load_balance", None)
    if not isinstance(mesh, DeviceMesh) or not isinstance(balanced, bool):
        raise NotImplementedError(
            "this version of torch does not say how its `context_parallel` spreads the sequence\n"
            "hint: `fused_attn.integrations.distributed.context_parallel`"
        )
    order: Any = "zigzag" if balanced else "contiguous"
    return _TorchsSpread(group_of(mesh), order, "ring", True)
