"""Benchmarks: each script measures ratios within one run, interleaved, and writes its figures as JSON."""
