"""What goes wrong through no fault of the program, told in one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something that the user can mend; the message says what and where."""


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main`; end with 2 and the message after a `UserError`, with 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: `--resume` goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
