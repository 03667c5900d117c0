"""Triton kernels of the norms: `launch.py` in front, `backend.py` the entry."""
