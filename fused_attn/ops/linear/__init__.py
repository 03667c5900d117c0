"""x Wᵀ + bias and what comes after it: the products around attention."""

from . import cpu, reference, torch_linear

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (cpu, torch_linear, reference)
