"""Which of our operations a model calls."""

from __future__ import annotations

from typing import Any

import pytest

from fused_attn.ops.bias_activation import call as bias_activation_call
from fused_attn.ops.layer_norm import call as layer_norm_call


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of a norm or an activation of ours, from now on."""
    seen: list[str] = []
    for name, module in (("norm", layer_norm_call), ("activation", bias_activation_call)):
        plain = module.run

        def run(*args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            seen.append(_name)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(module, "run", run)
    return seen
