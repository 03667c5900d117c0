"""What runs in each attention layer of a transformers model, as far as its code tells."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

_NAMED = re.compile(r"Attention|Attn")
_OWN, _TORCH = "its own code", "torch.nn's code"
_COMPUTES = re.compile(r"softmax\(|scaled_dot_product_attention\(|flex_attention\(")
_SPARSE = re.compile(r"_attn_implementation in \(\"eager\", \"sdpa\"\)")
_LOOKED_UP = re.compile(r"ALL_ATTENTION_FUNCTIONS\b|\.get_interface\(")


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        kind: name of its class.
        runs: the `attn_implementation` that it looks up, in quotes, or whose code it runs.
        ours: True if that is an implementation of fused_attn.
    """

    name: str
    kind: str
    runs: str
    ours: bool


@dataclass(frozen=True)
class Report:
    """What `check` found. Print it, or read its fields; true if every layer runs ours.

    Attributes:
        warnings: what should be known beside, one line each.
    """

    layers: tuple[Attention, ...]
    warnings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers) and all(layer.ours for layer in self.layers)

    def __str__(self) -> str:
        ours = sum(layer.ours for layer in self.layers)
        lines = [f"{ours} of {len(self.layers)} attention layers run fused_attn"]
        lines += [f"  {x.name or '(model)'}: {x.kind} runs {x.runs}" for x in self.layers]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def check(model: nn.Module) -> Report:
    """Which attention runs in each layer of a transformers model; nothing is run.

    A layer is a module whose class is named for attention and whose code looks up transformers'
    AttentionInterface, or has a softmax of its own.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    layers = [layer for name, module in model.named_modules() for layer in _layer(name, module)]
    return Report(tuple(layers), tuple(_warnings(layers, type(model).__name__)))


def _layer(name: str, module: nn.Module) -> list[Attention]:
    """The module as an attention layer; none if it is no such thing."""
    cls: Any = type(module)
    kind = cls.__name__
    if isinstance(module, nn.MultiheadAttention):
        ours = cls.__module__.startswith("fused_attn.")
        return [Attention(name, kind, "the module of fused_attn" if ours else _TORCH, ours)]
    how = _how(cls) if _NAMED.search(kind) else None
    if how == "looked up":
        asked, function = _implementation(module)
        ours = function is not None and function.__module__.startswith("fused_attn.")
        return [Attention(name, kind, repr(asked), ours)]
    return [Attention(name, kind, _OWN, False)] if how == "computed" else []


def _warnings(layers: list[Attention], model: str) -> list[str]:
    if not layers:
        return [f"no attention layer found in {model}"]
    found = []
    own = sorted({layer.kind for layer in layers if layer.runs == _OWN})
    if own:
        found.append(
            f"{', '.join(own)}: computes attention itself and ignores `attn_implementation`"
        )
    if any(layer.runs == _TORCH for layer in layers):
        found.append("`fused_attn.fuse(model)` swaps the attention of torch.nn")
    others = sorted({x.runs for x in layers if not x.ours and x.runs not in (_OWN, _TORCH)})
    if others:
        found.append(
            f"{', '.join(others)} runs where fused_attn could: "
            'register() and then model.set_attn_implementation("fused_attn")'
        )
    return found


@functools.cache
def why_not(model_class: Any) -> str | None:
    """Why models of this class cannot run an attention of ours, with the way out; None if they can.

    Told from the file of the class. One without attention layers leaves it to the models that it is
    made of.
    """
    name = model_class.__module__
    try:
        source = inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return None  # nobody can tell
    layers = re.search(r"^class \w*(Attention|Attn)\w*\(.*Module", source, re.MULTILINE)
    if layers and not _LOOKED_UP.search(source):
        return (
            f"the attention layers of {name} compute attention themselves and never "
            "ask transformers' AttentionInterface, so that nothing would change\n"
            "hint: leave `attn_implementation` out; `fused_attn.fuse(model)` still swaps norms and "
            "feed-forwards"
        )
    if _SPARSE.search(source):
        return (
            f"{name} chooses keys by an indexer, and hands them on as a mask under "
            'the names "eager" and "sdpa" alone\n'
            'hint: `register(replace_sdpa=True)`, and attn_implementation="sdpa"'
        )
    return None


@functools.cache
def keep_theirs(model_class: Any) -> tuple[str, ...]:
    """The attention classes that a model of this class may use and that never ask, beside others.

    They are found by name, from the class on through the classes of its file; the parts that
    another file has are models themselves.
    """
    classes: dict[str, Any] = {
        name: found
        for name, found in vars(sys.modules[model_class.__module__]).items()
        if inspect.isclass(found) and issubclass(found, nn.Module)
    }
    reached, ahead = set[str](), [model_class.__name__]
    while ahead:
        name = ahead.pop()
        if name in reached or name not in classes:
            continue
        reached.add(name)
        ahead += [word for cls in classes[name].__mro__ for word in _words(cls) & classes.keys()]
    return tuple(sorted(n for n in reached if _NAMED.search(n) and _how(classes[n]) == "computed"))


@functools.cache
def _words(cls: type) -> set[str]:
    """The words in the source of a class that says what a model is made of.

    torch's say nothing of it, and the base of all models of a file names the parts of all.
    """
    if cls.__module__.startswith(("torch.", "builtins")) or cls.__name__.endswith(
        "PreTrainedModel"
    ):
        return set()
    try:
        return set(re.findall(r"\w+", inspect.getsource(cls)))
    except (OSError, TypeError):
        return set()


@functools.cache
def _how(layer_class: Any) -> str | None:
    """How a class comes to its attention; None if around another layer, or without source."""
    found = None
    for cls in layer_class.__mro__:
        if cls is nn.Module:
            break
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue
        if _LOOKED_UP.search(source):
            return "looked up"
        if _COMPUTES.search(source):
            found = found or "computed"
    return found


def _implementation(module: nn.Module) -> tuple[Any, Any]:
    """The name that a layer asks for, and the function behind it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return asked, ALL_ATTENTION_FUNCTIONS.get(asked) if asked else None
