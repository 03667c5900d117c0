"""The classes of problems of the CPU gates, one module a kind."""

from . import attention, calls, layer_norm, modules, packed

ROWS = [row for kind in (attention, packed, layer_norm, modules, calls) for row in kind.rows()]
