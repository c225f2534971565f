"""Benchmarks: ``python -m benchmarks lrua|scaling [--json FILE]``."""
