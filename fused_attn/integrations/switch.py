"""What doors that are switched on and off share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def for_a_while(
    is_active: Callable[[], bool], activate: Callable[[], None], restore: Callable[[], None]
) -> Iterator[None]:
    """Active for the body of a `with`; what was active before stays so."""
    was_active = is_active()
    activate()
    try:
        yield
    finally:
        if not was_active:
            restore()
