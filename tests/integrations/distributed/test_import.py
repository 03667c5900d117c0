"""The door patches nothing and loads nothing of torch's before it is needed."""

from __future__ import annotations

from tests.cases.fresh_process import run

CODE = """
import sys
import fused_attn
assert "torch.distributed.tensor" not in sys.modules
import torch
import torch.nn.functional as F
before = F.scaled_dot_product_attention
fused_attn.attention(*torch.randn(3, 1, 1, 2, 4))
assert "fused_attn.integrations.distributed" not in sys.modules
from fused_attn.integrations import distributed
assert F.scaled_dot_product_attention is before
from torch.distributed.tensor import DTensor
known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert not [op for op in known if "fused_attn" in str(op)], "rules before the first DTensor"
distributed.register()
assert [op for op in known if "fused_attn" in str(op)]
"""


def test_nothing_happens_at_import() -> None:
    run(CODE)
