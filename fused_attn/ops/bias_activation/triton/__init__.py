"""Triton kernels of bias + activation; `backend.py` is the entry."""
