"""A list that stops says so, beside JSON as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Casparian, initialized
from tests.plugs import ROWS

FILES = 60


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """60 files worked, to be looked at only."""
    folder: Path = tmp_path_factory.mktemp("many")
    made = initialized(folder / "flow")
    source = folder / "in"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number}.txt").write_text("one\n" * 20)
    made.run("source", "add", source, "--settle", "0")
    made.run("publish", made.plugin("rows", ROWS))
    made.run("scan", "--drain")
    return made


LISTS = {
    "jobs": FILES,
    "files": FILES,
    "outputs list": FILES,
    "audit show --subject job*": FILES,
}


@pytest.mark.parametrize("words", LISTS)
def test_a_list_says_where_it_stops(many: Casparian, words: str) -> None:
    total = LISTS[words]
    short = many.run(*words.split())
    assert short.stderr.splitlines()[-1] == f"50 of {total}; --limit N or --all"
    assert len(short.stdout.splitlines()) == 51
    done = many.run(*words.split(), "--json", "--limit", "7")
    assert done.stderr == f"7 of {total}; --limit N or --all\n"
    for whole in (["--all"], ["--limit", str(total)], ["--limit", "9999"]):
        assert many.run(*words.split(), *whole).stderr == ""
        assert len(many.json(*words.split(), *whole)) == total
    assert "not both" in many.err(*words.split(), "--all", "--limit", "1", code=2)


def test_a_query_says_where_it_stops(many: Casparian) -> None:
    sql = "SELECT * FROM lines"
    assert many.err("query", sql) == "50 of 1,200; --limit N or --all\n"
    assert many.err("query", sql, "--all") == ""
    assert len(many.out("query", sql, "--all").splitlines()) == 1201
    assert len(many.json("query", sql)) == 1200
    assert many.err("query", sql, "--json", "--limit", "3") == "3 of 1,200; --limit N or --all\n"
    assert many.err("query", sql, "--csv", "--limit", "3") == "3 of 1,200; --limit N or --all\n"


def test_seals_are_asked_for_by_name(many: Casparian) -> None:
    without = {row["action"] for row in many.json("audit", "show", "--all")}
    assert "seal" not in without
    assert "seal" in {row["action"] for row in many.json("audit", "show", "--all", "--seals")}


@pytest.mark.slow
def test_a_status_says_how_many_reasons_it_leaves_out(casparian: Casparian, source: Path) -> None:
    fails = ROWS.replace(
        'self.publish("lines"', 'raise ValueError(lines[0])\n        self.publish("lines"'
    )
    casparian.run("publish", casparian.plugin("rows", fails))
    for number in range(12):
        (source / f"{number}.txt").write_text(f"number {number}\n")
    done = casparian.run("scan", "--drain", code=1)
    assert done.stderr.count("failed: in/") == 12
    assert "10 of 12; casparian jobs --status FAILED --all" in casparian.err("status")
    assert casparian.json("status")["reasons_in_all"] == 12
