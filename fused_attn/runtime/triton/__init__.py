"""Triton: launching, rows of a matrix, the choice of tiles."""
