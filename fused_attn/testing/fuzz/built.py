"""What a case becomes: a call that can be made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

SINGLE = ("alibi_slopes", "sinks")  # float32 in a call of any dtype


@dataclass(frozen=True)
class Built:
    """A call.

    Attributes:
        function: a public function that takes `backend=`.
        tensors: its tensors by name of the argument.
        options: everything else.
        outputs: names of its results, in order.
        noise: as that of `check_against_oracle`.
        takes_out: the function has an `out`.
    """

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("out",)
    noise: Callable[..., list[float]] | None = None
    takes_out: bool = False
    pairs: tuple[str, ...] = ()  # arguments that are pairs of tensors, `name 0` and `name 1`
    arrange: Callable[[list[Any]], list[Any]] | None = None  # results, as `noise` wants them

    def call(self, tensors: dict[str, Tensor], backend: str | None, **more: Any) -> list[Any]:
        """The results, in a list."""
        given = {name: x.float() if name in SINGLE else x for name, x in tensors.items()}
        for name in self.pairs:
            given[name] = (given.pop(f"{name} 0"), given.pop(f"{name} 1"))  # type: ignore[assignment]
        found = self.function(**given, **self.options, **more, backend=backend)
        results = list(found) if isinstance(found, tuple) else [found]
        if self.arrange is not None:
            results = self.arrange(results)
        return results + [None] * (len(self.outputs) - len(results))
