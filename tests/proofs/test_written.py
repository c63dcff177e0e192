"""Random tables in random dialects: what is published is what was written."""

from __future__ import annotations

import random

import pytest

from proofs import written_tables


@pytest.mark.slow
def test_what_is_published_is_what_was_written() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # python -m proofs.written_tables --count 300 --seed N
    assert written_tables.run(300, seed) == []
