"""The model alone shows what each situation says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.truth.model import Model
from tests.truth.situations import GOOD, SITUATIONS, Story


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("tell", SITUATIONS, ids=lambda tell: tell.__name__)
def test_the_model_shows_what_the_situation_says(tell: Callable[[Story], None], mode: str) -> None:
    tell(Story(Model(), mode=mode))


def test_every_situation_is_told() -> None:
    told = {int(tell.__name__[1:3]) for tell in SITUATIONS if tell.__name__[0] == "s"}
    assert told == set(range(1, 25))


def test_contents_that_are_nowhere_keep_their_rows_in_a_rebuild() -> None:
    s = Story(Model(kept=False))
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.write("a.txt", "two")
    s.settle()
    s.set_topic("p", "lines", {"S2": "append"})
    s.rebuild("p")
    s.work()
    s.shows("a.txt 1 good one", sink="S1")
    s.shows("a.txt 2 good two", sink="S2")


def test_a_version_whose_bytes_are_gone_is_not_worked() -> None:
    s = Story(Model(kept=False))
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.scan()
    s.write("a.txt", "two")
    s.work()
    s.shows()
    s.settle()
    s.shows("a.txt 2 good two")
