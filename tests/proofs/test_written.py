"""Random tables, in the suite: a few, with seeds that are shown (proofs/README.md)."""

from __future__ import annotations

import pytest

from proofs import written_tables


@pytest.mark.slow
def test_what_is_published_is_what_was_written(seed: int) -> None:
    assert written_tables.run(300, seed) == []
