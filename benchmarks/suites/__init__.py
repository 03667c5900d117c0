"""Benchmarks that users run: `python -m benchmarks`. The package itself imports none of it.

A *problem* says what is computed, a *side* (one of our backends, or a peer) computes it, the
*judge* holds every side against float64, and only what is right is timed: docs/benchmarks.md.
"""
