"""Trials of many files: in their order, in few guests, each with its own end."""

from __future__ import annotations

from pathlib import Path

import pytest

from casparian_flow import config, durable
from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger
from casparian_flow.services import trial
from casparian_flow.services.trial import First, Trials
from tests.plugs import plugin

TELLS = plugin(
    'pattern="*.txt", topic="said"',
    """
    text = open(file_path).read()
    print("read", text)
    if text == "3":
        raise ValueError("three")
    self.publish("said", pa.table({"text": [text], "guest": [id(self)], "named": [ME]}))
    """,
    imports="random",
).replace("MANIFEST =", "ME = random.random()\nMANIFEST =")


@pytest.mark.parametrize("number", [4, trial.MANY_FILES])
def test_many_files_are_tried_in_warm_guests(
    settings: Settings, ledger: Ledger, source: Path, number: int
) -> None:
    file = settings.home / "tells.py"
    file.write_text(TELLS)
    subject = trial.subject(ledger, settings, str(file))
    files = []
    for name in range(number):
        (source / f"{name}.txt").write_text(str(name))
        files.append(trial.of_file(ledger, source / f"{name}.txt"))
    done: list[str] = []
    with Trials(settings, config.cache_folder(), subject) as trials:
        tried = trials.run(
            files, lambda: First(subject.artifact.topics, 1, 1), lambda one: done.append(one.name)
        )
    assert [each.name for each in tried] == [f"{name}.txt" for name in range(number)]
    assert sorted(done) == sorted(each.name for each in tried)
    assert [each.log.startswith(f"read {name}") for name, each in enumerate(tried)] == (
        [True] * number
    )
    assert [bool(each.error) for each in tried] == [name == 3 for name in range(number)]
    guests = {
        row["named"]
        for each in tried
        if not each.error
        for row in each.output.tables["said"].to_pylist()
    }
    assert len(guests) <= (2 if number >= trial.MANY_FILES else 1)
    assert not list(settings.database.trials_folder.iterdir())


def test_a_balance_is_read_from_the_last_line_that_has_one() -> None:
    log = (
        "INFO:delimited:read as utf-8\n"
        "read 1 = 1 published + 0 rejected + 0 skipped\n"
        "read 1,012 = 1,003 published + 6 rejected + 3 skipped (preamble 2, footer 1)\n"
    )
    assert trial.balance(log) == (1012, 1003, 6, 3, "preamble 2, footer 1")
    assert trial.balance("read 3 lines") is None


def test_the_start_of_a_daemon_removes_what_dead_trials_left(settings: Settings) -> None:
    trials = settings.database.trials_folder
    with durable.scratch(trials, trials.with_name(f"{trials.name}.lock")) as alive:
        (trials / "dead" / "in").mkdir(parents=True)
        (trials / "dead" / "in" / "a.csv").write_text("left")
        trial.sweep(settings.database)
        assert list(trials.iterdir()) == [alive]
    assert not list(trials.iterdir())
    trial.sweep(settings.database)
