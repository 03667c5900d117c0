"""PyTorch's own test files, run with our classes under torch.nn's names.

The wheel of torch has no tests: point PYTORCH_TESTS at the `test` folder of a PyTorch checkout of
the installed version. Tests that look into torch's private internals, or that hold torch to what we
do otherwise on purpose, are left out; docs/differences.md says why for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = os.environ.get("PYTORCH_TESTS")


class Selection(NamedTuple):
    """What to run of a file, as pytest's -k takes it; what to leave out; further plugins."""

    run: str = ""
    left_out: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


_MODULES = "ransformer or LayerNorm or RMSNorm or Multihead or layer_norm or layernorm or multihead"

FILES = {
    "nn/test_multihead_attention.py": Selection(
        left_out=(
            "test_multihead_attn_nested_tensor_outside_fast_path",
            "test_multihead_self_attn_two_masks_fast_path_mock",
        ),
        plugins=("sdpa_plugin",),
    ),
    "test_transformers.py": Selection(
        "TestTransformers",
        (
            "test_disable_fastpath",
            "test_mask_check_fastpath",
            "test_script",
            "test_train_with_is_causal",
            "test_transformerencoderlayer_subclass",
        ),
    ),
    # These compare numbers at padding, which packed batches do not compute.
    "test_nn.py": Selection(_MODULES, ("test_transformerencoderlayer_cpu",), ("padding_plugin",)),
    "test_modules.py": Selection(_MODULES, ("test_memory_format_nn_RMSNorm",)),
    "test_nestedtensor.py": Selection("layer_norm"),
    "test_expanded_weights.py": Selection("layer_norm"),
}
EXCLUDED = {name for selection in FILES.values() for name in selection.left_out}


@pytest.mark.skipif(FOLDER is None, reason="PYTORCH_TESTS names no folder of PyTorch's tests")
@pytest.mark.parametrize("file", FILES)
def test_upstream_file_passes(file: str) -> None:
    path = Path(FOLDER or "") / file
    run, left_out, plugins = FILES[file]
    wanted = " and ".join([*([f"({run})"] if run else []), *(f"not {name}" for name in left_out)])
    switches = [switch for plugin in ("drop_in_plugin", *plugins) for switch in ("-p", plugin)]
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), str(path.parent), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *switches, "--noconftest", "-p", "no:cacheprovider",
         "--rootdir", str(path.parent), "-c", os.devnull, "-k", wanted, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_every_excluded_test_has_its_reason_in_the_documentation() -> None:
    differences = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()
    for name in EXCLUDED:
        assert f"`{name}`" in differences, name
