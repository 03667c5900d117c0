"""Triton kernels of attention: one kernel family a file, `launch.py` in front, `backend.py` the entry."""
