"""The whole Transformer under torch's tools: compiled, exported, scripted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import FusedTransformer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:enable_ne")]

N, L, S, E, H, FF = 3, 6, 8, 16, 4, 32


def transformer_and_inputs() -> tuple[FusedTransformer, dict[str, Tensor]]:
    model = FusedTransformer(E, H, 2, 2, FF, dropout=0.0, batch_first=True)
    arguments = {
        "src": torch.randn(N, S, E),
        "tgt": torch.randn(N, L, E),
        "tgt_mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "src_key_padding_mask": torch.arange(S) >= torch.tensor([S, 4, 1])[:, None],
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([S, 4, 1])[:, None],
    }
    return model, arguments


@pytest.mark.parametrize("dynamic", [False, True])
def test_whole_transformer_compiles_as_one_graph(dynamic: bool) -> None:
    """torch.nn's reads the mask to see whether it is causal, which no graph can hold."""
    torch._dynamo.reset()
    model, arguments = transformer_and_inputs()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = model(**arguments)
    torch.testing.assert_close(compiled(**arguments), expected)
    grads = []
    for module in (model, compiled):
        model.zero_grad()
        module(**arguments).sin().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_whole_transformer_exports() -> None:
    model, arguments = transformer_and_inputs()
    model.eval()
    program = torch.export.export(model, (), arguments)
    torch.testing.assert_close(program.module()(**arguments), model(**arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_is_refused_with_a_way_out() -> None:
    model, _ = transformer_and_inputs()
    with pytest.raises(NotImplementedError, match=r"fused_attn.unfuse\(model\)"):
        torch.jit.script(model)
    with pytest.raises(NotImplementedError, match="FusedRMSNorm"):
        torch.jit.script(nn.Sequential(fused_attn.FusedRMSNorm(E)))
    fused_attn.unfuse(model)
    torch.jit.script(model)
