"""Benchmarks against the plain script or the common tool that does the same work.

    python -m benchmarks [NAME ...] [--rounds N] [--quick] [--scratch DIR]

`catalogue.py` defines the comparisons; `ours/` and `peers/` have the programs of the two sides.
"""
