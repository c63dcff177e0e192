"""The product shows what each situation says: pairwise over the sinks' kinds, the mode and the
situation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.truth.model import Model
from tests.truth.product import Product
from tests.truth.situations import SITUATIONS, Story

SQLITE = {"S1": "sqlite", "S2": "parquet"}
PARQUET = {"S1": "parquet", "S2": "sqlite"}


def cases() -> Iterator[object]:
    """Each situation with either kind of sink and either mode; both combinations in turn."""
    for number, tell in enumerate(SITUATIONS):
        kinds = [SQLITE, PARQUET] if number % 2 else [PARQUET, SQLITE]
        for sinks, mode in zip(kinds, ("append", "replace"), strict=True):
            marks = [pytest.mark.slow] if mode == "replace" else []
            name = f"{tell.__name__}-{sinks['S1']}-{mode}"
            yield pytest.param(tell, sinks, mode, id=name, marks=marks)


@pytest.mark.parametrize(("tell", "sinks", "mode"), list(cases()))
def test_the_product_shows_what_the_situation_says(
    tell: Callable[[Story], None], sinks: dict[str, str], mode: str, tmp_path: Path
) -> None:
    if "go_away" in tell.__code__.co_names and os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root can make a sink's filesystem read-only")
    with contextlib.closing(Product(tmp_path, sinks)) as product:
        story = Story(Model(), product, mode)
        tell(story)
        story.kill()
        assert product.problems() == []
        assert product.failures() == story.model.failures()
