"""`fuse(model)` and `unfuse(model)`: change the classes of modules in place, and nothing else.

Our modules have no state beside those whose place they take, so a module changes sides by its
`__class__` alone: parameters, buffers, hooks, optimizers, tied weights and parametrizations never
notice.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from .modules import DROP_INS, LINEAR_DROP_INS, foreign

_EVERY = {**DROP_INS, **LINEAR_DROP_INS}
_STOCK = {fused: stock for stock, fused in _EVERY.items()}
DropIns = Mapping[type[nn.Module], type[nn.Module]]
Known = type[nn.Module] | str | None
Candidate = tuple[nn.Module, Known]

_KEPT = "_fused_attn_kept"  # attribute that holds what `fuse` switched off in a module left alone


@dataclass(frozen=True)
class Swap:
    """One module whose class was changed.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        before, after: names of the classes.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftAlone:
    """One module that could have been meant, and why its class was not changed."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `fuse` or `unfuse` did. Print it, or read its fields.

    Attributes:
        warnings: arguments that had no effect, one line each.
    """

    swapped: tuple[Swap, ...]
    left_alone: tuple[LeftAlone, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left_alone)} left alone"]
        lines += [f"  {s.name or '(model)'}: {s.before} -> {s.after}" for s in self.swapped]
        groups: dict[tuple[str, str], list[str]] = {}
        for m in self.left_alone:
            groups.setdefault((m.kind, m.reason), []).append(m.name or "(model)")
        for (kind, reason), names in groups.items():
            many = f" and {len(names) - 1} more" if len(names) > 3 else ""
            for name in names[:1] if many else names:
                lines.append(f"  {name}{many}: {kind} left alone: {reason}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def fuse(
    model: nn.Module, *, skip: Iterable[str | type[nn.Module]] = (), linears: bool = False
) -> Report:
    """Put our modules in the place of torch.nn's, and of other people's, in place.

    Swapped are modules whose class is exactly one of `fused_attn.modules.DROP_INS`, parametrized
    ones included; norms and feed-forwards whose code is known (those of transformers and timm, and
    the same code elsewhere); and what `fuse.register(cls, converter)` was told. Left alone, with a
    reason, are other subclasses (they may rely on torch.nn's internals), scripted and quantized
    modules, instances whose `forward` was replaced, and whatever is named for attention, a norm or
    a feed-forward and is not known. If a
    module left alone is an encoder layer or an encoder whose inference fast path would bypass fused
    modules inside it, that path is switched off.

    Args:
        model: changed in place. May itself be one of the modules.
        skip: modules to leave alone, by qualified name (shell patterns, as "decoder.*") or class.
        linears: swap every nn.Linear as well, wherever it stands, and linears of others that are
            known (transformers' Conv1D, which GPT-2 is made of): a gain on processors whose
            products `fused_attn.linear` does faster than torch, and no loss elsewhere.

    Returns:
        What was swapped, what was left alone and why, and warnings of what had no effect: an item
        of `skip` that keeps no module from being swapped, a model with nothing to swap.

    Raises:
        TypeError: `model` is no module, `linears` no bool, or `skip` holds something else than
            names and classes.
    """
    _check_model(model)
    if not isinstance(linears, bool):
        raise TypeError(f"`linears` must be a bool, got {linears!r}")
    drop_ins = _EVERY if linears else DROP_INS
    patterns = _skipped(skip)
    swapped, left_alone = [], []
    names = dict(model.named_modules())
    candidates = _candidates(names, drop_ins)
    warnings = [_without_effect(item, names, candidates) for item in patterns]
    if not candidates:
        warnings.append(_nothing_to_fuse(model, drop_ins))
    for name, (module, known) in candidates.items():
        kind = type(module).__name__
        stock = _plain_class(module)
        reason = _why_not(name, module, stock, patterns, drop_ins, known)
        if reason is not None:
            left_alone.append((name, module, kind, reason))
            continue
        _change_class(module, known if isinstance(known, type) else drop_ins[stock])
        swapped.append(Swap(name, kind, type(module).__name__))
    return Report(
        tuple(swapped),
        tuple(
            LeftAlone(name, kind, reason + _disarm(module))
            for name, module, kind, reason in left_alone
        ),
        tuple(filter(None, warnings)),
    )


def unfuse(model: nn.Module) -> Report:
    """Put torch.nn's modules, and other people's, back in place: the reverse of `fuse`.

    Weights are those that they have by now. Modules that were made as ours become torch.nn's too.

    Returns:
        What was swapped; what was left alone, since torch.nn has no such thing (attention with a
        rotary position embedding, a norm with a `weight_offset`, and everything around them); and a
        warning if there was nothing.

    Raises:
        TypeError: `model` is no module.
    """
    _check_model(model)
    swapped, left_alone = [], []
    for name, module in model.named_modules():
        fused = _plain_class(module)
        reason = _lacking(module) if fused in _STOCK else None
        if reason is not None:
            left_alone.append(LeftAlone(name, type(module).__name__, reason))
            continue
        for attribute, value in module.__dict__.pop(_KEPT, {}).items():
            setattr(module, attribute, value)
        stock = _stock_of(fused)
        if stock is not None:
            before = type(module).__name__
            _change_class(module, stock)
            swapped.append(Swap(name, before, type(module).__name__))
    warnings = () if swapped or left_alone else (_nothing_to_unfuse(model),)
    return Report(tuple(swapped), tuple(left_alone), warnings)


fuse.register = foreign.register  # type: ignore[attr-defined]


def _lacking(module: nn.Module) -> str | None:
    """What `module`, or one inside it, has and torch.nn has not."""
    for each in module.modules():
        if getattr(each, "rotary_base", None) is not None:
            return "torch.nn has no rotary position embedding"
        if getattr(each, "weight_offset", 0.0):
            return "torch.nn has no norm with a `weight_offset`"
    return None


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")


def _skipped(skip: Iterable[str | type[nn.Module]]) -> tuple[str | type[nn.Module], ...]:
    if isinstance(skip, (str, type)):
        skip = (skip,)
    items = tuple(skip)
    for item in items:
        is_class = isinstance(item, type) and issubclass(item, nn.Module)
        if not (is_class or isinstance(item, str)):
            raise TypeError(f"`skip` must hold names and module classes, got {item!r}")
    return items


def _without_effect(
    item: str | type[nn.Module], modules: dict[str, nn.Module], candidates: dict[str, Candidate]
) -> str | None:
    """A warning if `item` of `skip` keeps no module from being swapped."""
    if isinstance(item, type):
        matched = [name for name, module in modules.items() if isinstance(module, item)]
        shown = item.__name__
    else:
        matched = [name for name in modules if fnmatch.fnmatchcase(name, item)]
        shown = repr(item)
    if any(name in candidates for name in matched):
        return None
    if matched:
        return f"{shown} in `skip` matches only modules that are not swapped anyway"
    text = f"{shown} in `skip` matches no module"
    close = _close_to(item, list(candidates)) if isinstance(item, str) else None
    return text if close is None else f"{text}; hint: {close!r}"


def _close_to(pattern: str, candidates: list[str]) -> str | None:
    """A pattern that was probably meant by one that matches no name."""
    deeper = f"*.{pattern}"  # as torch.compile and DataParallel put a name in front
    if fnmatch.filter(candidates, deeper):
        return deeper
    stem, star, rest = pattern.partition("*")
    ends = {name[: i + 1] for name in candidates for i, char in enumerate(name) if char == "."}
    choices = {name.lower(): name for name in sorted([*candidates, *ends] if star else candidates)}
    found = difflib.get_close_matches(stem.lower(), choices, n=1)
    return choices[found[0]] + star + rest if found else None


def _nothing_to_fuse(model: nn.Module, drop_ins: DropIns) -> str:
    if any(_fused_within(model)):
        return "the model has nothing more to swap: what could be is fused"
    known = ", ".join(stock.__name__ for stock in drop_ins)
    return (
        f"the model has no module to swap; known are {known} of torch.nn, and norms and "
        "feed-forwards of others by their code"
    )


def _nothing_to_unfuse(model: nn.Module) -> str:
    return f"{type(model).__name__} holds no module of fused_attn"


def _stock_of(cls: type) -> type[nn.Module] | None:
    """In whose place a class of ours stands; None for any other class."""
    return _STOCK.get(cls) or foreign.STOCK.get(cls)


def _candidates(names: dict[str, nn.Module], drop_ins: DropIns) -> dict[str, Candidate]:
    """What might be swapped, or might be thought to be: the module, and what is known of it.

    That is the class for it, why it stays, or None where `drop_ins` and `_why_not` decide.
    """
    found: dict[str, Candidate] = {}
    for name, module in names.items():
        cls: Any = _plain_class(module)
        if _stock_of(cls) is not None:
            continue
        known: Known = None
        if not isinstance(module, torch.jit.ScriptModule):
            known = foreign.fused_class(module, cls, nn.Linear in drop_ins)
        if known is None and not _is_candidate(module, drop_ins):
            known = foreign.why_unknown(cls)
            if known is None:
                continue
        found[name] = (module, known)
    return found


def _is_candidate(module: nn.Module, drop_ins: DropIns) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in {stock.__name__ for stock in drop_ins}
    if isinstance(module, NonDynamicallyQuantizableLinear):  # attention reads its parameters
        return False
    return isinstance(module, tuple(drop_ins))


def _why_not(
    name: str,
    module: nn.Module,
    stock: type,
    skip: tuple[str | type[nn.Module], ...],
    drop_ins: DropIns,
    known: Known,
) -> str | None:
    """Why `fuse` leaves `module` alone; None if it does not."""
    for item in skip:
        if isinstance(item, str):
            if fnmatch.fnmatchcase(name, item):
                return f"its name matches {item!r} in `skip`"
        elif isinstance(module, item):
            return f"{item.__name__} is in `skip`"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted; fuse the model before torch.jit.script"
    if isinstance(known, str):
        return known
    if known is None and stock not in drop_ins:
        base = next(c for c in stock.__mro__ if c in drop_ins)
        return f"{stock.__module__}.{stock.__qualname__} is a subclass of torch.nn.{base.__name__}"
    if "forward" in module.__dict__:
        return "its `forward` was replaced on the instance"
    return None


def _plain_class(module: nn.Module) -> type:
    """The class of `module`; of a parametrized one, the class that it had before."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # torch gives each parametrized module a class of its own, whose properties compute the
        # tensors; the same properties on top of the new class.
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _disarm(module: nn.Module) -> str:
    """Keep torch.nn's inference fast path from bypassing fused modules in `module`; what was done.

    torch.nn has no public switch for one module. An encoder layer takes the path only if its
    `activation_relu_or_gelu` is not 0, an encoder only if its `use_nested_tensor` is true.
    """
    switches = []
    if isinstance(module, nn.TransformerEncoderLayer) and any(_fused_within(module)):
        switches.append(("activation_relu_or_gelu", 0))
    if isinstance(module, nn.TransformerEncoder) and any(_fused_within(module)):
        switches.append(("use_nested_tensor", False))
    if isinstance(module, torch.jit.ScriptModule) or not switches:
        return ""
    kept = module.__dict__.setdefault(_KEPT, {})
    for attribute, off in switches:
        kept.setdefault(attribute, getattr(module, attribute, off))
        setattr(module, attribute, off)
    return "; its inference fast path is off, which would bypass the fused modules inside"


def _fused_within(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if _stock_of(_plain_class(m)) is not None)
