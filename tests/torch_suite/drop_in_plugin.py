"""pytest plugin: torch.nn's names stand for our classes, before a test file is imported."""

from __future__ import annotations

import sys

import torch

from fused_attn.modules import DROP_INS

for stock, fused in DROP_INS.items():
    for module in (torch.nn, torch.nn.modules, sys.modules[stock.__module__]):
        setattr(module, stock.__name__, fused)
    # torch.nn.modules.transformer imports these from its neighbours.
    if hasattr(torch.nn.modules.transformer, stock.__name__):
        setattr(torch.nn.modules.transformer, stock.__name__, fused)
