"""Measurements: `python -m benchmarks` for the suites, cpu_gates.py, gpu/, compiler/."""
