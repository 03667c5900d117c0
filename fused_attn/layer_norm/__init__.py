"""norm(dropout(x) + residual): LayerNorm and RMSNorm, with the sum returned as well or not."""

from . import cpu, cuda, reference

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (cuda, cpu, reference)
