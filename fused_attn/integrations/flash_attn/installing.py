"""Modules under the name `flash_attn`, and what transformers asks before it uses them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ..._version import __version__
from . import bert_padding, interface, kvcache, rotary

# Of flash_attn, whose arguments these functions have: code asks for it to know what it may pass.
VERSION = "2.8.3"
_FUNCTIONS: dict[str, Sequence[ModuleType]] = {
    "flash_attn": (interface, kvcache),
    "flash_attn.flash_attn_interface": (interface, kvcache),
    "flash_attn.bert_padding": (bert_padding,),
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": (rotary,),
}
_installed: dict[str, ModuleType] = {}
_undo: list[Callable[[], None]] = []


def install(force: bool = False) -> None:
    """Make `import flash_attn` give our functions, in this process; again does nothing.

    transformers' `attn_implementation="flash_attention_2"` works from then on, on a CPU as well.
    Modules that were imported before and kept flash_attn's functions keep them.

    Args:
        force: also where a real flash_attn is installed.

    Raises:
        RuntimeError: a real flash_attn is installed, and `force` is False.
    """
    if _installed:
        return
    if not force and _real_is_there():
        raise RuntimeError(
            "flash_attn is installed here; `install(force=True)` puts ours in its place, "
            "`pip uninstall flash-attn` removes it"
        )
    before = {name: module for name, module in sys.modules.items() if _is_flash_attn(name)}
    for name in before:
        del sys.modules[name]
    _undo.append(lambda: sys.modules.update(before))
    for name, sources in _FUNCTIONS.items():
        module = _installed[name] = sys.modules[name] = _module(name, sources)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(_installed[parent], child, module)
    _tell_transformers()


def uninstall() -> None:
    """Take the modules back; who imported functions from them keeps those."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()
    while _undo:
        _undo.pop()()


def is_installed() -> bool:
    return bool(_installed)


def _is_flash_attn(name: str) -> bool:
    return name.partition(".")[0] == "flash_attn"


def _real_is_there() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _module(name: str, sources: Sequence[ModuleType]) -> ModuleType:
    module = ModuleType(name, f"`{name}` by fused_attn {__version__}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin=__file__)
    module.__file__ = __file__
    module.__version__ = VERSION  # type: ignore[attr-defined]
    module.__path__ = []  # no file of a real flash_attn is found below it
    for source in sources:
        for function in source.__all__:
            setattr(module, function, getattr(source, function))

    def missing(attribute: str) -> Any:
        raise AttributeError(
            f"module {name!r} is fused_attn's and has no {attribute!r}; it has "
            + ", ".join(sorted(f for source in sources for f in source.__all__))
        )

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


_TRANSFORMERS = "transformers.modeling_flash_attention_utils"


def _tell_transformers() -> None:
    """transformers looks for flash_attn's distribution and for a GPU; here neither is needed."""
    if _TRANSFORMERS in sys.modules:
        _patch(sys.modules[_TRANSFORMERS])
        return
    finder = _Afterwards(_TRANSFORMERS, _patch)
    sys.meta_path.insert(0, finder)
    _undo.append(lambda: sys.meta_path.remove(finder) if finder in sys.meta_path else None)


def _patch(module: Any) -> None:
    """Let transformers' check of flash_attention_2 pass."""
    table = module.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    before, check = dict(table), module.is_flash_attn_2_available
    loaded = module._loaded_implementation

    def restore() -> None:
        table.update(before)
        module.is_flash_attn_2_available = check
        module._loaded_implementation = loaded

    def yes(*args: Any, **options: Any) -> bool:
        return True

    module.is_flash_attn_2_available = yes
    module._loaded_implementation = None  # so that it imports again
    table["general_availability_check"] = table["pkg_availability_check"] = yes
    table["supported_devices"] = ((yes, "cpu"), *before["supported_devices"])
    _undo.append(restore)


class _Afterwards(importlib.abc.MetaPathFinder):
    """Calls a function on a module as soon as somebody has imported it."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            loader.exec_module = exec_module
        return spec
