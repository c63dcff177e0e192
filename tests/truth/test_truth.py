"""The model and the product, told the same events, show the same rows after each of them;
`python -m proofs.truth` does more of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.truth import walks
from tests.truth.product import Product
from tests.truth.walks import Difference, Step, Teller

RUNS = 20
SEED = 4100
STEPS = 25
"""The proof has 40."""
QUICK = 4
"""So many of the runs are among the quick tests."""


@pytest.mark.parametrize("run", range(RUNS))
@pytest.mark.slow_but(*map(str, range(QUICK)))
def test_model_and_product_show_the_same(run: int, tmp_path: Path) -> None:
    """These walks are always the same; the proof draws new ones."""
    walks.compare(tmp_path, SEED + run, STEPS)


def test_a_walk_does_of_everything() -> None:
    """What is drawn can mostly be done, and no event is drawn in vain."""
    done: Counter[str] = Counter()
    for seed in range(30):
        teller = Teller(None)
        for step in walks.walk(seed, 40, walks.drawn()):
            teller.tell(step)
        teller.end()
        done.update(step.event for step in teller.done)
    assert set(done) == walks.drawn()
    assert sum(done.values()) > 30 * 40 / 2, done


def test_a_product_that_shows_a_row_too_few_is_found_and_its_story_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    real = Product.query
    monkeypatch.setattr(
        Product, "query", lambda *a: [row for row in real(*a) if row.line != "!three"]
    )
    steps = [
        Step("publish", ("p", "two")), Step("write", ("a.txt", "one")), Step("settle"),
        Step("write", ("b.txt", "!three")), Step("settle"),
    ]  # fmt: skip
    with pytest.raises(Difference) as found:
        walks.compare(tmp_path, seed, 0, steps)
    events = [step.event for step in found.value.steps]
    assert events == ["publish", "write", "settle"]
    assert "casparian query, current of marked" in str(found.value)


def test_the_same_seed_draws_the_same_steps() -> None:
    assert walks.walk(7, STEPS, walks.drawn()) == walks.walk(7, STEPS, walks.drawn())
