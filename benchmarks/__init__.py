"""Timings against peers, on inputs whose results were checked first: `python -m benchmarks --help`."""
