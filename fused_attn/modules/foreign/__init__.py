"""Modules of other people's libraries, fused in place: what `fuse` does beyond torch.nn.

A class is known by the formula of its `forward` (`formula`), not by its name: nothing is imported,
and the same code in one's own file is known too. What is made is a subclass of the class at hand
with another `forward` and no state of its own, so that a module changes sides by its `__class__`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from . import feed_forwards, linears, norms, residuals
from .formula import formula_of

Converter = Callable[[Any], "type[nn.Module] | str | None"]

REGISTERED: dict[type[nn.Module], type[nn.Module] | Converter] = {}
STOCK: dict[type[nn.Module], type[nn.Module]] = {}  # of each class that was put in, whose place
_FORMS = {
    **norms.NORMS,
    **feed_forwards.FEED_FORWARDS,
    **residuals.RESIDUALS,
    **linears.LINEARS,
}

_NORM = re.compile(r"Norm(2d|Fp32|1P|Gated|PerHead)*$")
_FEED_FORWARD = re.compile(r"(MLP|Mlp|FeedForward|Intermediate|FFN|DenseActDense|GatedActDense)$")
_ATTENTION = re.compile(r"Attention|Attn")
_COMPUTES = re.compile(r"softmax\(|scaled_dot_product_attention\(|flex_attention\(")
_LOOKED_UP = re.compile(r"ALL_ATTENTION_FUNCTIONS\b|\.get_interface\(")


def register(cls: type[nn.Module], converter: type[nn.Module] | Converter | None) -> None:
    """Tell `fuse` what to put in the place of modules of class `cls`; also as `fuse.register`.

    Args:
        cls: the exact class; subclasses are not meant.
        converter: a subclass of `cls` that needs no attribute which `cls` does not set; or a
            function of the module that returns such a class, or a sentence why this module stays.
            None forgets what was registered.

    Raises:
        TypeError: one of them is something else.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"`cls` must be a class of modules, got {cls!r}")
    if converter is None:
        REGISTERED.pop(cls, None)
        return
    if isinstance(converter, type):
        _check_subclass(converter, cls)
    elif not callable(converter):
        raise TypeError(f"`converter` must be a subclass of {cls.__name__} or a function that "
                        f"returns one, got {converter!r}")  # fmt: skip
    REGISTERED[cls] = converter


def fused_class(
    module: nn.Module, cls: Any, with_linears: bool = False
) -> type[nn.Module] | str | None:
    """What to put in the place of `module` of class `cls`, why nothing, or None if unknown.

    Args:
        module: it is asked for its attributes.
        cls: its class, without parametrizations.
        with_linears: single linears count too.

    Raises:
        TypeError: a registered function returns something else.
    """
    if cls in REGISTERED:
        converter = REGISTERED[cls]
        found = converter if isinstance(converter, type) else converter(module)
        if isinstance(found, type):
            _check_subclass(found, cls)
            STOCK[found] = cls
        elif not isinstance(found, str) and found is not None:
            raise TypeError(f"the function registered for {cls.__name__} must return a subclass of "
                            f"it, a sentence or None, got {type(found).__name__}")  # fmt: skip
        return found or None
    if cls.__module__.startswith("torch.") or cls.forward is nn.Module.forward:
        return None
    formula = formula_of(cls)
    if formula is None or (formula.text in linears.LINEARS and not with_linears):
        return None
    reason: str | None = None
    for number, form in enumerate(_FORMS.get(formula.text, ())):
        found_reason = form.why_not(module, formula)
        if found_reason is None:
            return _class_of(cls, number)
        reason = found_reason or reason
    return reason


def why_unknown(cls: type[nn.Module]) -> str | None:
    """Why a module that looks like one of ours stays; None if it does not look like one."""
    if cls.__module__.startswith(("torch.", "fused_attn.")):
        return None
    name = cls.__name__
    if _NORM.search(name) or _FEED_FORWARD.search(name):
        return f"its code is none that is known: {_hint(cls)}"
    if not _ATTENTION.search(name):
        return None
    source = _source(cls)
    if _LOOKED_UP.search(source):
        return (
            "transformers looks its attention up: `register()` of fused_attn.integrations."
            'transformers, then `model.set_attn_implementation("fused_attn")`'
        )
    if "scaled_dot_product_attention(" in source:
        return "`activate()` of fused_attn.integrations.torch_sdpa gives it our attention"
    return f"it computes attention itself: {_hint(cls)}" if _COMPUTES.search(source) else None


def _hint(cls: type) -> str:
    return f"`fuse.register({cls.__name__}, ...)` tells what to put in its place"


def _source(cls: type) -> str:
    found = []
    for each in cls.__mro__:
        if each is nn.Module:
            break
        try:
            found.append(inspect.getsource(each))
        except (OSError, TypeError):
            continue
    return "\n".join(found)


@functools.cache
def _class_of(cls: Any, number: int) -> type[nn.Module]:
    """A subclass of `cls` that runs a form of its formula, or theirs where that returns None."""
    formula = formula_of(cls)
    assert formula is not None
    fused = _FORMS[formula.text][number].make(formula.attributes)
    theirs = cls.forward
    expected = 2 if "x1" in formula.text else 1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and len(kwargs) == expected == 1:
            args, kwargs = tuple(kwargs.values()), {}  # whatever its name
        if len(args) == expected and not kwargs:
            y = fused(self, *args)
            if y is not None:
                return y
        return theirs(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        return _empty, (cls, number), self.__dict__  # the class is made again where it is loaded

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__}
    made = type(f"Fused{cls.__name__}", (cls,), body)
    STOCK[made] = cls
    return made


def _empty(cls: Any, number: int) -> nn.Module:
    made = _class_of(cls, number)
    return made.__new__(made)


def _check_subclass(converter: type, cls: type[nn.Module]) -> None:
    if not issubclass(converter, cls) or converter is cls:
        raise TypeError(f"`converter` must be a subclass of {cls.__name__}, got {converter!r}")
