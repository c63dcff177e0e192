"""The pages say what is so: settings, states, names, commands and snippets."""

from __future__ import annotations

import importlib
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow import bundled, config
from casparian_flow.cli import start
from casparian_flow.config import Settings
from casparian_flow.db.schema import migrations
from casparian_flow.db.states import JobStatus
from tests.cli.write_docs import every_command
from tests.conftest import write_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "proofs/README.md")),
    *sorted(DOCS.rglob("*.md")),
]

WORDS = """
    Source root, Location, Version, Routing rule, Plugin, Topic, Sink, Job, Attempt, Guest, Worker,
    Scout, Sentinel, Committer, Gatekeeper
"""
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FENCE = r"```{}\n(.*?)```"


def read(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(FENCE.format(language), page.read_text("utf-8"), re.DOTALL)


def test_every_setting_stands_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `([^`]+)` \|", read("configuration.md"), re.MULTILINE)
    sections = msgspec.to_builtins(Settings(), enc_hook=str)
    del sections["home"], sections["database"]["store"], sections["database"]["mssql"]
    defaults = {f"{s}.{k}": json.dumps(v) for s, keys in sections.items() for k, v in keys.items()}
    assert dict(rows) == defaults


def test_the_configuration_here_is_what_init_writes() -> None:
    assert (ROOT / config.FILE_NAME).read_text("utf-8") == start._text()


def test_the_arrows_are_those_of_the_database() -> None:
    page = read("job_lifecycle.md")
    drawn = re.findall(r"^    (\w+) --> (\w+):", page, re.MULTILINE)
    trigger = "".join(migrations()).rpartition("TRIGGER cf_processing_queue_arrows")[2]
    allowed = re.findall(r"'(\w+)>(\w+)'", trigger)
    assert len(allowed) > len(JobStatus)
    # The trigger allows one move that no code makes.
    assert set(drawn) == set(allowed) - {("QUEUED", "SUPERSEDED")}
    assert len(drawn) == len(set(drawn))
    assert re.findall(r"^\| `([A-Z]+)` \|", page, re.MULTILINE) == list(JobStatus)


def test_every_word_is_defined_once() -> None:
    defined = re.findall(r"^\*\*(.+?)\*\*: ", read("glossary.md"), re.MULTILINE)
    assert len(set(defined)) == len(defined)
    assert {word.strip() for word in WORDS.split(",")} <= set(defined)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_pages_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"`(casparian_flow(?:\.\w+)+)`", text):
        if name != config.DatabaseSettings().db_location:
            resolve(name)
    for other in re.findall(r"\]\(([\w/.-]+)\)", text):
        assert (page.parent / other).exists(), other
    for other in re.findall(r"\bdocs/(?:\w+/)?\w+(?:\.md)?", text):
        assert any(ROOT.glob(f"{other}*")), other


def resolve(name: str) -> Any:
    """A module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(resolve(parent), attribute)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_proofs_in_the_pages_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w*)", text):
        source = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), f"{file}::{name}"
    for module in re.findall(r"python -m ((?:proofs|tests)\.[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").exists() or path.with_suffix(".py").exists(), module


def test_every_fault_has_a_proof() -> None:
    row = r"^\| F(\d+) \S[^|]* \| \S[^|]* \| (\S[^|]*) \|$"
    rows = re.findall(row, read("faults.md"), re.MULTILINE)
    numbers = [*range(1, 37), *range(40, 64), *range(70, 87), *range(90, 121)]
    assert [int(number) for number, _ in rows] == numbers
    named = re.compile(r"`tests/\S+::test_\w+`|`python -m proofs\.|`casparian|not automated: \w+")
    assert [number for number, proof in rows if not named.search(proof)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_are_there(page: Path) -> None:
    known = set(every_command())
    groups = {words[:1] for words in known if len(words) > 1}
    for code in CODE.findall(page.read_text("utf-8")):
        for verb, member in re.findall(r"(?<![\w/-])casparian ([a-z]+)(?: ([a-z]+)\b)?", code):
            assert (verb,) in known, code
            assert not member or (verb,) not in groups or (verb, member) in known, code


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    finance = tmp_path / "inbox" / "data" / "finance.csv"
    finance.parent.mkdir(parents=True)
    finance.write_text("month,euro\n1,2\n")
    page = DOCS / "python_api.md"
    names: dict[str, Any] = {}
    for code in snippets(page, "python"):
        exec(compile(code, str(page), "exec"), names)
    assert names["report"].versions == 1
    names["engine"].dispose()
    (query,) = snippets(page, "sql")
    with closing(sqlite3.connect(tmp_path / "casparian_flow.sqlite3")) as database:
        (row,) = database.execute(query).fetchall()
    assert row[0] == "data/finance.csv"


def test_the_plugin_of_the_pages_is_one() -> None:
    from casparian_flow.security.manifest import read_manifest

    (source,) = snippets(DOCS / "writing_a_plugin.md", "python")
    assert read_manifest(source.encode(), "sales.py").topics == ["sales_data"]


def test_the_quickstart_lists_every_bundled_plugin() -> None:
    page = (DOCS / "quickstart.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", page, re.MULTILINE)
    topics = {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in listed}
    assert topics == {each["name"]: set(each["topics"]) for each in bundled.describe()}


# Tables: the reference has exactly the words that a contract takes.


def cells(page: str, heading: str) -> list[list[str]]:
    """The rows of the table below a heading, its head left out."""
    text = read(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_reference_has_every_word_of_a_contract() -> None:
    from casparian_flow import contract, contract_words

    def named(heading: str) -> list[str]:
        return [row[0].strip("`") for row in cells("table_reference.md", heading)]

    assert named("The contract") == list(contract._KEYS)
    assert named("Types") == list(contract_words.TYPES)
    assert named("Columns") == list(contract._WORDS)
    for word, _, kinds in (
        (r[0].strip("`"), r[2], r[1]) for r in cells("table_reference.md", "Columns")
    ):
        allowed = contract._WORDS[word][1]
        assert kinds == (", ".join(allowed) or "all"), word
    of_reader: dict[str, list[str]] = {reader: [] for reader in contract.READERS}
    for word, readers, _ in cells("table_reference.md", "Dialect"):
        for reader in readers.split(", "):
            of_reader[reader].append(word.strip("`"))
    assert {k: sorted(v) for k, v in of_reader.items()} == {
        k: sorted(v) for k, v in contract.DIALECT.items()
    }
    drift = read("table_reference.md").partition("\n## Drift\n")[2].partition("\n| ---")[0]
    assert tuple(re.findall(r"`(\w+)`", drift)) == contract.DRIFTS


def test_the_reference_has_the_columns_of_rejects() -> None:
    from casparian_flow import typed

    assert [
        row[0].strip("`") for row in cells("table_reference.md", "Rejects")
    ] == typed.REJECTS.names


def test_the_contract_of_the_reference_is_one() -> None:
    import tomllib

    from casparian_flow import contract

    (document,) = snippets(DOCS / "table_reference.md", "toml")
    made = contract.read(tomllib.loads(document))
    assert contract.read(contract.literal(made)) == made
    assert [column.name for column in made.columns] == [
        "order", "day", "amount", "paid", "zip", "region",
    ]  # fmt: skip
