"""norm(dropout(x) + residual): LayerNorm and RMSNorm, with the sum returned as well or not."""

from . import cpu, cuda, reference, torch_functions
from .triton import backend as triton_backend

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (cuda, triton_backend, cpu, torch_functions, reference)
