"""The compiled module: how it loads, and how it sees torch's tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fused_attn._version import __version__
from fused_attn.runtime import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.bool,
    torch.int32,
    torch.int64,
]


@pytest.fixture(params=["exchange", "attributes"])
def view(request):
    """``describe`` through torch's exchange API and attribute by attribute, as with older torch."""
    module = native.module()
    before = module.use_exchange_api(request.param == "exchange")
    yield module.describe
    module.use_exchange_api(before)


def expected(tensor):
    return {
        "data": tensor.data_ptr(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": "cpu",
        "device_id": 0,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_shapes_and_strides_are_those_of_the_tensor(view, dtype):
    base = torch.zeros(3, 4, 5, 6, dtype=dtype)
    for tensor in (
        base,
        base.transpose(1, 2),
        base[1:, ::2, :, 3],
        base[:1, :1].expand(7, 4, 5, 6),
        base.as_strided((2, 3), (1, 1)),
        base[..., 0, 0],
        base[0, 0, 0, 0],
        base[2:, 3:, 4:],
    ):
        assert view(tensor) == expected(tensor)


def test_parameters_and_results_of_autograd_are_read_like_any_tensor(view):
    parameter = torch.nn.Parameter(torch.randn(4, 5))
    assert view(parameter) == expected(parameter)
    result = parameter * 2
    assert view(result) == expected(result)
    with torch.inference_mode():
        frozen = torch.randn(3)
    assert view(frozen) == expected(frozen)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 4)])
def test_an_empty_tensor_is_there(view, shape):
    seen = view(torch.empty(shape))
    assert seen["data"] != 0
    assert seen["shape"] == shape


def test_none_is_absent(view):
    assert view(None) is None


def test_what_the_kernels_do_not_know_is_refused_by_name(view):
    with pytest.raises(ValueError, match=r"`tensor` must have a dtype .*, got torch.uint8"):
        view(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"`tensor` must have at most 8 dimensions, got 9"):
        view(torch.zeros((1,) * 9))
    with pytest.raises(TypeError, match=r"`tensor` must be a torch.Tensor or None, got list"):
        view([1.0])


def test_the_module_says_how_it_was_built():
    info = native.module().build_info()
    assert isinstance(info["cuda"], bool)
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["version"] == __version__


def test_why_not_names_the_missing_module():
    code = (
        "import sys; sys.modules['fused_attn._C'] = None\n"
        "from fused_attn.runtime import native\n"
        "assert 'fused_attn._C' in native.why_not()\n"
        "try:\n    native.module()\n"
        "except RuntimeError as error:\n    assert str(error) == native.why_not()\n"
        "else:\n    raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
