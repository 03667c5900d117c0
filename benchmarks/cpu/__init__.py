"""The classes of problems of the CPU gates, one module a kind."""

from . import attention, bias_activation, calls, encoder, layer_norm, modules, packed

KINDS = (attention, packed, layer_norm, bias_activation, modules, encoder, calls)
ROWS = [row for kind in KINDS for row in kind.rows()]
