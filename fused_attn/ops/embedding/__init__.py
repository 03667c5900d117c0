"""dropout(scale · weight[tokens] + positions): what a Transformer's first layer reads."""

from . import cpu, reference, torch_functions

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (cpu, torch_functions, reference)
