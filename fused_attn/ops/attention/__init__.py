"""softmax(Q K^T / sqrt(D)) V with its masks: one problem, one reference, one file a backend."""

from . import cpu, cuda, reference, torch_sdpa
from .triton import backend as triton_backend

# In order of preference; `why_not` decides. A new backend is one more name here.
BACKENDS = (cuda, triton_backend, torch_sdpa, cpu, reference)
