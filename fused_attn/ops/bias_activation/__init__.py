"""dropout(act(x + bias)) and its gated form: what stands between the linears of a feed-forward."""

from . import cpu, reference, torch_functions
from .triton import backend as triton_backend

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (triton_backend, cpu, torch_functions, reference)
