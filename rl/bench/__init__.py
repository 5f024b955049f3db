"""Benchmarks: ours beside public peers, in one run."""
