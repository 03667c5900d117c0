"""Fixtures that every test file shares."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fused_attn
from fused_attn import dispatch
from fused_attn.attention import BACKENDS as ATTENTION_BACKENDS
from fused_attn.bias_activation import BACKENDS as BIAS_ACTIVATION_BACKENDS
from fused_attn.bias_activation import call as bias_activation_call
from fused_attn.bias_activation.problem import Operands as BiasActivationOperands
from fused_attn.layer_norm import BACKENDS as LAYER_NORM_BACKENDS
from fused_attn.layer_norm import call as layer_norm_call
from fused_attn.layer_norm.problem import Operands as LayerNormOperands


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`<operation>_backend` runs over the operation's BACKENDS: a new one inherits every test."""
    for fixture, backends in (
        ("attention_backend", ATTENTION_BACKENDS),
        ("layer_norm_backend", LAYER_NORM_BACKENDS),
        ("bias_activation_backend", BIAS_ACTIVATION_BACKENDS),
    ):
        if fixture in metafunc.fixturenames:
            names = [backend.NAME for backend in backends]
            metafunc.parametrize(fixture, names, indirect=True)
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("fuzz")))


# Of what takes long in Triton's interpreter and tells little that the other cases don't.
INTERPRETED_SHARE_OF_FUZZ = 5
NOT_INTERPRETED = re.compile(
    r"test_opcheck\[(everything|weights|pre)|test_results_repeat_bit_for_bit\[.*everything"
    r"|test_nan_in_a_key_that_nobody_sees.*float16|test_fullgraph_compile.*(True|packed)"
)


LACKING_DTYPES = (
    "has no kernels for torch.float64",
    "Triton's interpreter multiplies bfloat16 matrices wrongly",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out most random cases, and the largest others, of a backend that is interpreted."""
    slow = {
        backend.NAME
        for backend in (*ATTENTION_BACKENDS, *LAYER_NORM_BACKENDS, *BIAS_ACTIVATION_BACKENDS)
        if dispatch.only_by_name(backend)
    }
    dropped = [item for item in items if _is_left_out(item, slow)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


def _is_left_out(item: pytest.Item, slow: set[str]) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if not slow.intersection(x for x in params.values() if isinstance(x, str)):
        return False
    seldom = params.get("fuzz_seed", 0) % INTERPRETED_SHARE_OF_FUZZ != 0
    return seldom or NOT_INTERPRETED.match(item.name) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that wants a dtype which its backend lacks is skipped, with the backend's words."""
    try:
        return (yield)
    except fused_attn.UnsupportedError as error:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for backend in (x for x in params.values() if isinstance(x, str)):
            for reason in LACKING_DTYPES:
                if f"  {backend}: {reason}" in str(error):
                    pytest.skip(f"{backend}: {reason}")
        raise


@pytest.fixture
def attention_backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that can run here; its own reasons are the reasons to skip.

    A test that is parametrised by `dtype` wants it to run that dtype.
    """
    x = torch.zeros(1, 1, 1, 1, dtype=_dtype_of(request))
    reasons = dict(fused_attn.explain(x, x, x).reasons)[request.param]
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture
def layer_norm_backend(request: pytest.FixtureRequest) -> str:
    """As `attention_backend`, for the norms."""
    operands = LayerNormOperands(torch.zeros(1, 1, dtype=_dtype_of(request)))
    problem = layer_norm_call.problem_of(operands, layer_norm_call.Scalars(1, 1e-5, False))
    [backend] = [b for b in LAYER_NORM_BACKENDS if request.param == b.NAME]
    if reasons := backend.why_not(problem):
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture
def bias_activation_backend(request: pytest.FixtureRequest) -> str:
    """As `attention_backend`, for bias + activation."""
    operands = BiasActivationOperands(torch.zeros(1, 1, dtype=_dtype_of(request)))
    problem = bias_activation_call.problem_of(operands, bias_activation_call.Scalars("relu"))
    [backend] = [b for b in BIAS_ACTIVATION_BACKENDS if request.param == b.NAME]
    if reasons := backend.why_not(problem):
        pytest.skip("; ".join(reasons))
    return request.param


def _dtype_of(request: pytest.FixtureRequest) -> torch.dtype:
    callspec = getattr(request.node, "callspec", None)
    return callspec.params.get("dtype", torch.float32) if callspec else torch.float32


@pytest.fixture(autouse=True, scope="session")
def faster_interpreter() -> None:
    """Triton's interpreter patches its language anew in every call of a helper; once will do."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, core = interpreter._patch_lang, interpreter.tl.core
    scopes: dict[bool, Any] = {}

    class Whole:
        """The scopes of one launch, undone together when it ends."""

        def restore(self) -> None:
            while scopes:
                scopes.popitem()[1].restore()

    def patch_once(function: Any) -> Any:
        through_core = any(value is core for value in function.__globals__.values())
        if through_core not in scopes:
            scopes[through_core] = patch(function)
        return Whole()

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor starts as NaN, so that an unwritten element cannot pass."""
    for name in ("empty", "empty_like", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))


def _poisoning(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and type(tensor) is torch.Tensor and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=200, help="random cases a backend")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations: threads that wait for each other take all the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
