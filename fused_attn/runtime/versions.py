"""Which versions of other packages are installed."""

from __future__ import annotations

import importlib.metadata


def installed(name: str) -> str | None:
    """The version of a distribution, as "3.6.0"; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
