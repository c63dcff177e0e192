"""Measured comparisons with the plain script or the known tool that a person would use instead.

    python -m benchmarks [NAME ...] [--rounds N] [--quick] [--scratch DIR]

`catalogue.py` says what is compared, `ours/` and `peers/` hold the programs of the two sides.
"""
