"""The classes of problems of the CPU gates, one module a kind."""

from . import attention, calls, encoder, layer_norm, modules, packed

ROWS = [
    row for kind in (attention, packed, layer_norm, modules, encoder, calls) for row in kind.rows()
]
