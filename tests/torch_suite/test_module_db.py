"""The inputs that torch tests its own modules with (module_db), run on ours.

torch ships them; the checks are those of its generic module tests, in our words. Every check takes
every input of every class that `fuse` covers.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fused_attn import FusedTransformerDecoderLayer, FusedTransformerEncoderLayer, fuse
from fused_attn.modules import DROP_INS

common_modules = pytest.importorskip("torch.testing._internal.common_modules")

INFOS = {info.name: info for info in common_modules.module_db if info.module_cls in DROP_INS}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def cases(
    name: str, dtype: torch.dtype, training: bool
) -> Iterator[tuple[Any, nn.Module, nn.Module]]:
    """Each input with torch's module and ours, of equal parameters."""
    info = INFOS[name]
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    for case in inputs:
        made = case.constructor_input
        stock = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        ours = DROP_INS[info.module_cls](*copy.deepcopy(made.args), **made.kwargs).to(dtype)
        fuse(ours)
        ours.load_state_dict(stock.state_dict(), strict=True)
        yield case, stock, ours.train(training)


def call(module: nn.Module, case: Any, change=lambda tensor: tensor) -> list[Tensor]:
    args, kwargs = tree_map(
        lambda x: change(x) if isinstance(x, Tensor) else x,
        (case.forward_input.args, case.forward_input.kwargs),
    )
    return [x for x in tree_leaves(module(*args, **kwargs)) if isinstance(x, Tensor)]


def gradients(module: nn.Module, case: Any) -> list[Tensor | None]:
    leaves = tree_leaves((case.forward_input.args, case.forward_input.kwargs))
    inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    wanted = [*inputs, *module.parameters()]
    torch.manual_seed(0)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in call(module, case))
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def test_torch_has_inputs_for_every_class_of_ours() -> None:
    covered = {info.module_cls for info in INFOS.values()}
    # torch has no inputs for this one; its layers are covered.
    assert set(DROP_INS) - covered == {nn.TransformerDecoder}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", INFOS)
def test_outputs_and_gradients_agree(name: str, training: bool) -> None:
    for case, stock, ours in cases(name, torch.float64, training):
        for module in ours.modules():
            if isinstance(module, (FusedTransformerEncoderLayer, FusedTransformerDecoderLayer)):
                module.pack_padding = False  # compare the positions of the padding as well
        expected = call(stock, case)
        if not all(x.isfinite().all() for x in expected):
            continue  # a fully masked row on one of torch's paths: our own tests hold ours
        torch.testing.assert_close(call(ours, case), expected)
        torch.testing.assert_close(gradients(ours, case), gradients(stock, case))


@pytest.mark.parametrize("name", INFOS)
def test_agrees_with_torch_reference_functions(name: str) -> None:
    for case, _, ours in cases(name, torch.float32, training=True):
        if case.reference_fn is None:
            continue
        given = case.forward_input
        expected = case.reference_fn(ours, *given.args, **given.kwargs)
        expected = [x for x in tree_leaves(expected) if isinstance(x, Tensor)]
        torch.testing.assert_close(call(ours, case), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", INFOS)
def test_non_contiguous_inputs_change_nothing(name: str, training: bool) -> None:
    def spread(tensor: Tensor) -> Tensor:
        wide = torch.stack([tensor, tensor], dim=-1)
        return wide[..., 0]

    for case, _, ours in cases(name, torch.float64, training):
        torch.testing.assert_close(call(ours, case, spread), call(ours, case))


@pytest.mark.parametrize("name", INFOS)
def test_pickle_and_deepcopy_keep_the_answer(name: str) -> None:
    for case, _, ours in cases(name, torch.float32, training=False):
        expected = call(ours, case)
        try:
            pickled = pickle.dumps(ours)
        except (AttributeError, pickle.PicklingError):
            pickled = None  # the activation is a local function of torch's tests
        copies = [copy.deepcopy(ours), *([pickle.loads(pickled)] if pickled else [])]
        for other in copies:
            torch.testing.assert_close(call(other, case), expected)


@pytest.mark.parametrize("name", INFOS)
def test_factory_arguments_reach_every_parameter(name: str) -> None:
    for case, stock, _ in cases(name, torch.float32, training=True):
        made = case.constructor_input
        if name == "nn.TransformerEncoder":  # takes a layer, no device and dtype
            continue
        cls = DROP_INS[type(stock)]
        ours = cls(*made.args, **made.kwargs, device="meta", dtype=torch.float64)
        for parameter in ours.parameters():
            assert parameter.is_meta
            assert parameter.dtype == torch.float64


@pytest.mark.parametrize("name", INFOS)
def test_repr_is_that_of_torch_under_our_name(name: str) -> None:
    for _, stock, ours in cases(name, torch.float32, training=True):
        theirs = repr(stock)
        for cls, fused in DROP_INS.items():
            theirs = theirs.replace(f"{cls.__name__}(", f"{fused.__name__}(")
        assert repr(ours) == theirs


@pytest.mark.parametrize("name", INFOS)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    seen = set()
    for case, _, ours in cases(name, torch.float64, training=True):
        kinds = tuple(sorted(k for k, v in case.forward_input.kwargs.items() if v is not None))
        key = (len(case.forward_input.args), kinds, str(case.constructor_input.kwargs))
        if key in seen or len(seen) >= 6:
            continue  # a few of each are enough: both checks are slow
        seen.add(key)
        leaves = [x for x in case.forward_input.args if isinstance(x, Tensor) and x.requires_grad]

        run = functools.partial(call_with, ours, case, leaves)
        assert torch.autograd.gradcheck(run, tuple(leaves), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, tuple(leaves), fast_mode=True)


def call_with(module: nn.Module, case: Any, leaves: list[Tensor], *inputs: Tensor) -> Any:
    """The call of `case` with `inputs` in the place of `leaves`."""
    by_id = dict(zip(map(id, leaves), inputs, strict=True))
    return tuple(call(module, case, lambda tensor: by_id.get(id(tensor), tensor)))


@pytest.mark.parametrize("name", INFOS)
def test_moves_and_materialises(name: str) -> None:
    for case, _, ours in cases(name, torch.float32, training=False):
        expected = call(ours, case)
        empty = copy.deepcopy(ours).to("meta").to_empty(device="cpu")
        empty.load_state_dict(ours.state_dict())
        torch.testing.assert_close(call(empty, case), expected)
