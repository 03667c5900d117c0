"""Triton kernels of attention: a kernel family a file; `backend.py` is the entry."""
