"""Benchmarks on a real kernel: they print figures and ratios, measured in turn in one run, and assert nothing.

python -m hwtests.bench powernv8
"""
