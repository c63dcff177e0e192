"""Every seeded bug still applies, and the quick ones are caught here as well.

`python -m proofs.mutants` tries all of them.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from proofs.mutants.__main__ import caught
from proofs.mutants.seeded import MUTANTS, ROOT, Mutant, apply

QUICK = ["no fence check", "rename over"]
"""Some seconds each, most of them to start pytest."""


def test_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_names_tests_that_are_there(mutant: Mutant, tmp_path: Path) -> None:
    package = tmp_path / "casparian_flow"
    for file in {edit.file for edit in mutant.edits}:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "casparian_flow" / file, package / file)
    apply(mutant, package)
    for edit in mutant.edits:
        ast.parse((package / edit.file).read_text("utf-8"))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_a_quick_mutant_is_caught(name: str) -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    by, said = caught(mutant)
    assert by, said
