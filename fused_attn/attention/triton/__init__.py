"""Triton kernels of attention: a kernel family a file, `launch.py` before them, `backend.py` the entry."""
