"""ONNX Runtime on the CPU: its fused operators (com.microsoft), one node a graph.

Inputs and outputs are bound to torch's memory, so that nobody is charged for copies. A session has
its own threads; there is one for each number of threads that torch is set to.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..operations.attention import Attention
from ..operations.bias_activation import BiasActivation
from ..operations.layer_norm import EPS, AddNorm
from ..problem import Prepared, Problem
from .peer import Peer, import_error

DOMAIN = "com.microsoft"
OPSETS = {"": 17, DOMAIN: 1}
IR_VERSION = 8  # understood by every ONNX Runtime of the last years


class Node:
    """One operator on bound memory.

    Args:
        kind: operator of `DOMAIN`.
        inputs, outputs: tensors by name, float32 and contiguous; "" stands for an absent one.
        attributes: of the operator.
    """

    def __init__(
        self,
        kind: str,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor | None],
        **attributes: Any,
    ) -> None:
        self.model = _model(kind, inputs, outputs, attributes)
        self.inputs = inputs
        self.outputs = {name: x for name, x in outputs.items() if x is not None}
        self.sessions: dict[int, tuple[Any, Any]] = {}

    def run(self) -> tuple[Tensor, ...]:
        """The outputs, written anew."""
        threads = torch.get_num_threads()
        if threads not in self.sessions:
            self.sessions[threads] = self._session(threads)
        session, binding = self.sessions[threads]
        session.run_with_iobinding(binding)
        return tuple(self.outputs.values())

    def _session(self, threads: int) -> tuple[Any, Any]:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between calls would run into the next side's time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        numpy_float = importlib.import_module("numpy").float32
        for name, x in self.inputs.items():
            binding.bind_input(name, "cpu", 0, numpy_float, tuple(x.shape), x.data_ptr())
        for name, x in self.outputs.items():
            binding.bind_output(name, "cpu", 0, numpy_float, tuple(x.shape), x.data_ptr())
        return session, binding


def _model(
    kind: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor | None],
    attributes: Mapping[str, Any],
) -> bytes:
    onnx = importlib.import_module("onnx")
    helper, float_type = onnx.helper, onnx.TensorProto.FLOAT

    def described(tensors: Mapping[str, Tensor | None]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, float_type, list(x.shape))
            for name, x in tensors.items()
            if x is not None
        ]

    names = [name if x is not None else "" for name, x in outputs.items()]
    node = helper.make_node(kind, list(inputs), names, domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], kind, described(inputs), described(outputs))
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()


def _attention(problem: Attention, tensors: dict[str, Tensor]) -> Prepared:
    """MultiHeadAttention, which takes and gives (B, L, H D)."""
    width = problem.heads * problem.head_dim
    inputs = {
        name: tensors[name].detach().transpose(1, 2).contiguous().flatten(2) for name in "qkv"
    }
    out = torch.empty(problem.batch, problem.seqlen_q, width)
    node = Node(
        "MultiHeadAttention", inputs, {"out": out}, num_heads=problem.heads,
        unidirectional=int(problem.variant == "causal"),
    )  # fmt: skip
    shape = (problem.batch, problem.seqlen_q, problem.heads, problem.head_dim)
    return Prepared(node.run, restore=lambda name, x: x.view(shape).transpose(1, 2))


def _add_norm(problem: AddNorm, tensors: dict[str, Tensor]) -> Prepared:
    kind = "SkipSimplifiedLayerNormalization" if problem.rms else "SkipLayerNormalization"
    x, residual, *parameters = (x.detach() for x in tensors.values())
    inputs = {"x": x[None], "residual": residual[None]}
    inputs |= dict(zip(("weight", "bias"), parameters, strict=False))
    y, h = torch.empty_like(x), torch.empty_like(x)
    outputs = {"y": y[None], "mean": None, "rstd": None, "h": h[None]}
    node = Node(kind, inputs, outputs, epsilon=EPS)

    def forward() -> tuple[Tensor, Tensor]:
        node.run()
        return y, h

    return Prepared(forward)


def _bias_activation(problem: BiasActivation, tensors: dict[str, Tensor]) -> Prepared:
    x, bias = (x.detach() for x in tensors.values())
    out = problem.empty_result()
    return Prepared(Node("BiasGelu", {"x": x, "bias": bias}, {"out": out}).run)


def _missing() -> str | None:
    return import_error("onnxruntime", "onnxruntime") or import_error("onnx", "onnx")


def _limits(problem: Problem) -> list[str]:
    reasons = []
    if problem.device != "cpu":
        reasons.append("is a peer on the CPU alone")
    if problem.dtype != torch.float32:
        reasons.append("its CPU kernels are float32's")
    if problem.wants_gradient:
        reasons.append("is for inference")
    if isinstance(problem, Attention):
        if problem.variant not in ("full", "causal"):
            reasons.append("is asked without masks")
        if problem.heads != problem.heads_kv:
            reasons.append("its MultiHeadAttention has no grouped heads")
        if problem.variant == "causal" and problem.seqlen_q != problem.seqlen_k:
            reasons.append("is causal for equal lengths")
    if isinstance(problem, BiasActivation) and problem.gated:
        reasons.append("has no SwiGLU")
    if isinstance(problem, BiasActivation) and problem.dropout:
        reasons.append("is asked without dropout")
    return reasons


PEERS = (
    Peer(
        "onnxruntime",
        {"attention": _attention, "add_norm": _add_norm, "bias_activation": _bias_activation},
        missing=_missing,
        limits=_limits,
        package="onnxruntime",
        reuses_memory=frozenset({"attention"}),  # norms and activations of ours do so there too
    ),
)
