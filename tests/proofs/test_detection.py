"""The proofs of detection, in short; `python -m proofs.detection` has them long."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs.detection import bench, edits, writers


def tell(tally: edits.Tally) -> None:
    print(f"{tally.edits} edits, {tally.missed}")


@pytest.mark.parametrize("kind", ["as it comes", *bench.FILESYSTEMS])
@pytest.mark.slow_but("as it comes")
def test_no_edit_is_missed_after_settling_and_none_after_a_scrub(
    kind: str, tmp_path: Path, seed: int
) -> None:
    def prove(place: Path) -> None:
        with bench.scratch(place) as scratch:
            tally = edits.run(scratch, seed, 150, 100, tell)
            edits.run_mapped(scratch, seed, 20, 20, tally)
        assert (tally.missed, tally.foreign, tally.missed_by_scrub) == ([], 0, 0)
        assert tally.recorded > 100
        assert tally.hidden == tally.missed_by_scan  # what no stamp shows, no scan sees

    if kind == "as it comes":
        prove(tmp_path)
        return
    try:
        with bench.mounted(kind, megabytes=16) as place:
            prove(place)
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"{kind} cannot be made or mounted here, and is untested: {error}")


@pytest.mark.parametrize(
    ("pauses", "done_file"),
    [((0.05, 0.7), ""), ((1.2, 1.6), "{name}.done")],
    ids=["short pauses", "long pauses and done files"],
)
@pytest.mark.slow_but("short pauses")
def test_no_version_has_bytes_that_were_never_at_rest(
    tmp_path: Path, pauses: tuple[float, float], done_file: str, seed: int
) -> None:
    with bench.scratch(tmp_path, settle_seconds=0.5, done_file=done_file) as scratch:
        tally = writers.run(scratch, seed, 60, 60, pauses)
    assert (tally.never_at_rest, tally.lost) == ([], 0)
    if done_file:
        assert tally.unfinished == 0
