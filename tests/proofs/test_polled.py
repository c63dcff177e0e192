"""What readers see during commits, in short; `python -m proofs.polled` has a thousand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from proofs.polled import SCENES, Look, compare, size, trial
from tests.sinks.parquet_acts import small_groups

SEED = 11


@pytest.mark.slow
def test_a_reader_sees_whole_outputs_in_every_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_groups(monkeypatch.setattr)
    for name, looks, faults in trial(tmp_path, 15, SEED):
        assert faults == [], name
        assert looks > 2, name


def look(*jobs: int) -> Look:
    return {t: Counter({j: size(SEED, j, t) for j in jobs}) for t in ("left", "right")}


def test_what_a_reader_must_not_see_is_noticed() -> None:
    append, replace, *_ = SCENES
    for scene in (append, replace):
        assert compare(scene, SEED, look(1, 2), look(1, 2, 3)) == []
        half = look(1, 2)
        half["left"][2] -= 1
        assert "rows of left 2" in "".join(compare(scene, SEED, look(1, 2), half))
        torn = look(1, 2) | {"right": look(1)["right"]}
        assert "without the other" in "".join(compare(scene, SEED, look(1), torn))
        gone = compare(scene, SEED, look(1, 2), look(2))
        assert "any more" in "".join(gone) or "after [1, 2]" in "".join(gone)
    assert "has [1, 2, 4] after" in "".join(compare(replace, SEED, look(1, 2), look(1, 2, 4)))
    assert "gone back" in "".join(compare(replace, SEED, look(4), look(1)))
