"""`python -m fused_attn info`: what is here, which backends can run, and why the others cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from ._version import __version__
from .ops import dispatch
from .ops.attention import BACKENDS as ATTENTION_BACKENDS
from .ops.attention import call as attention_call
from .ops.attention.problem import Operands as AttentionOperands
from .ops.bias_activation import BACKENDS as BIAS_ACTIVATION_BACKENDS
from .ops.bias_activation import call as bias_activation_call
from .ops.bias_activation.problem import Operands as BiasActivationOperands
from .ops.embedding import BACKENDS as EMBEDDING_BACKENDS
from .ops.embedding import call as embedding_call
from .ops.embedding.problem import Operands as EmbeddingOperands
from .ops.layer_norm import BACKENDS as LAYER_NORM_BACKENDS
from .ops.layer_norm import call as layer_norm_call
from .ops.layer_norm.problem import Operands as LayerNormOperands
from .runtime import native

ENVIRONMENT = {
    "FUSED_ATTN_EMULATOR": "the built emulator: CUDA kernels on CPU tensors, for tests",
    "FUSED_ATTN_TUNING": "off, read, on: what becomes of tiles that were found to be fastest",
    "FUSED_ATTN_CPU": "instruction-set level of the CPU kernels, for tests",
}


def report() -> str:
    """The whole report as text."""
    sections = [_versions(), _native(), _backends(), _environment()]
    return "\n\n".join(sections)


def _versions() -> str:
    cuda = torch.version.cuda or "none"
    rows = {
        "fused_attn": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__} (CUDA {cuda})",
        "triton": _distribution_version("triton"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads for torch",
        "GPU": _gpu(),
    }
    return _table("versions", rows)


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _native() -> str:
    reason = native.why_not()
    if reason is not None:
        return _table("compiled part", {"missing": reason})
    module = native.module()
    rows = {"CPU level": f"{module.cpu_level()} (of {', '.join(module.available_cpu_levels())})"}
    rows.update({name: str(value) for name, value in module.build_info().items()})
    return _table("compiled part", rows)


def _backends() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sections = []
    for operation, explanation in _explanations(device):
        rows = {
            name: "; ".join(reasons) if reasons else "available"
            for name, reasons in explanation.reasons
        }
        sections.append(_table(f"{operation} backends for tensors on {device}", rows))
    return "\n\n".join(sections)


def _explanations(device: str) -> list[tuple[str, dispatch.Explanation]]:
    """What each operation says of the smallest problem on `device`."""
    x = torch.zeros(1, 1, 1, 1, device=device)
    attention = attention_call.problem_of(AttentionOperands(x, x, x), attention_call.Scalars())
    norm_scalars = layer_norm_call.Scalars((1,), None, False)
    norm = layer_norm_call.problem_of(LayerNormOperands(x), norm_scalars)
    activation_scalars = bias_activation_call.Scalars("relu")
    activation = bias_activation_call.problem_of(BiasActivationOperands(x), activation_scalars)
    tokens, weight = torch.zeros(1, dtype=torch.int64, device=device), x.view(1, 1)
    embedding = embedding_call.problem_of(
        EmbeddingOperands(tokens, weight), embedding_call.Scalars()
    )
    return [
        ("attention", dispatch.explain(ATTENTION_BACKENDS, attention)),
        ("layer norm", dispatch.explain(LAYER_NORM_BACKENDS, norm)),
        ("bias activation", dispatch.explain(BIAS_ACTIVATION_BACKENDS, activation)),
        ("embedding", dispatch.explain(EMBEDDING_BACKENDS, embedding)),
    ]


def _environment() -> str:
    rows = {
        name: f"{os.environ.get(name, 'not set')} ({meaning})"
        for name, meaning in ENVIRONMENT.items()
    }
    return _table("environment variables", rows)


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    return "\n".join([title, *lines])
