"""Fixtures that every test file shares."""

from __future__ import annotations

# ruff: noqa: E402
import os
from collections.abc import Iterator
from typing import Any

# Before torch loads OpenMP. Threads that spin while they wait for each other take the cores from
# the tests of the other processes: five times the time of the random cases, on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from tests.cases import without_gpu

without_gpu.arrange()

from torch._dynamo.exc import TorchDynamoException  # it imports Triton: after the arrangement

import fused_attn
from fused_attn.ops import dispatch
from fused_attn.ops.operations import OPERATIONS, Operation
from fused_attn.runtime import native, verified
from fused_attn.runtime.triton import device as triton_device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`<operation>_backend` runs over the operation's BACKENDS: a new one inherits every test."""
    for operation in OPERATIONS:
        fixture = f"{operation.name}_backend"
        if fixture in metafunc.fixturenames:
            names = [backend.NAME for backend in operation.backends]
            metafunc.parametrize(fixture, names, indirect=True)
    if "fuzz_seed" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_seed", range(metafunc.config.getoption("fuzz")))


def pytest_sessionstart() -> None:
    """`make sanitize` wants its own `_C` to be the one that is tested."""
    wanted = os.environ.get("FUSED_ATTN_TESTED_VERSION")
    if wanted is not None and native.module().build_info()["version"] != wanted:
        raise pytest.UsageError(f"the tests run {native.module().__file__}, which is not {wanted}")


LACKING_DTYPES = (
    "has no kernels for torch.float64",
    "Triton's interpreter multiplies bfloat16 matrices wrongly",
)


# Backends of torch's own functions express a part of the calls, and have tests of their own for it.
PARTIAL = {
    backend.NAME
    for operation in OPERATIONS
    for backend in operation.backends
    if dispatch.is_formula(backend) and backend.OPERANDS < set(operation.operands._fields)
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = {
        backend.NAME
        for operation in OPERATIONS
        for backend in operation.backends
        if triton_device.interpreted() and ".triton" in backend.__name__
    }
    dropped = {item for item in items if without_gpu.is_left_out(item, interpreted)}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that wants a dtype which its backend lacks is skipped, with the backend's words."""
    try:
        return (yield)
    except (fused_attn.UnsupportedError, TorchDynamoException) as error:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for backend in (x for x in params.values() if isinstance(x, str)):
            if backend in PARTIAL and f"backend {backend!r} cannot run" in str(error):
                pytest.skip(f"{backend} expresses a part of the calls only")
            for reason in LACKING_DTYPES:
                if f"  {backend}: {reason}" in str(error):
                    pytest.skip(f"{backend}: {reason}")
        raise


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _backend_fixture(operation: Operation) -> Any:
    """The fixture `<operation>_backend`: name of a backend that can run here.

    A test that is parametrised by `dtype` wants it to run that dtype, one that draws its dtype
    any, others float32. The backend's own reasons are the reasons to skip.
    """

    @pytest.fixture(name=f"{operation.name}_backend")
    def fixture(request: pytest.FixtureRequest) -> str:
        [backend] = [b for b in operation.backends if request.param == b.NAME]
        refusals = []
        for dtype in _dtypes_of(request):
            problem = operation.smallest(torch.device("cpu"), dtype)
            reasons = dispatch.why_not(backend, problem)
            if not reasons:
                return request.param
            refusals += reasons
        pytest.skip("; ".join(refusals))

    return fixture


(
    attention_backend,
    layer_norm_backend,
    bias_activation_backend,
    embedding_backend,
    linear_backend,
) = (_backend_fixture(operation) for operation in OPERATIONS)


def _dtypes_of(request: pytest.FixtureRequest) -> tuple[torch.dtype, ...]:
    callspec = getattr(request.node, "callspec", None)
    params = callspec.params if callspec else {}
    if "fuzz_seed" in params:
        return FLOATS
    return (params.get("dtype", torch.float32),)


@pytest.fixture(autouse=True, scope="session")
def faster_interpreter() -> None:
    without_gpu.import_kernels()
    without_gpu.make_interpreter_faster()


@pytest.fixture(autouse=True)
def no_figures_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer's own `selftest` measured decides nothing in a test."""
    monkeypatch.setattr(verified, "speed_here", lambda *key: None)


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
def deterministic_by_turns(request: pytest.FixtureRequest) -> Iterator[None]:
    """Half of the attention tests want results that repeat: backward passes may have two ways."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    turn = params.get("dtype") == torch.float16 or params.get("fuzz_seed", 0) % 2 == 1
    if "attention_backend" not in request.fixturenames or not turn:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=200, help="random cases a backend")
    parser.addoption(
        "--every", action="store_true", help="also what Triton's interpreter is slow at"
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny operations: threads that wait for each other take all the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
