"""Benchmarks: one harness, JSON results under results/<machine>/, tables and plots rendered from them.

Every script runs both ways: ``python benchmarks/bench_wti.py`` and ``python -m benchmarks.bench_wti``.
"""
