"""Hostile names and values on the whole way: plugin, guest, Worker, Committer, both sinks.

Each is kept to the letter in both, or its job fails with the column's name and neither has any of
it (rows 63 to 65 of the corpus; tests/sinks/test_hostile.py has many more, without a guest).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.dataset as ds
import pytest
from sqlalchemy import select

from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileLocation, FileVersion, ProcessingJob
from casparian_flow.services.scan import scan
from tests.conftest import write_config
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import publish

PLUGIN = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(
    pattern="*", sinks={"rows": ["parquet://output", "sqlite:///tables.sqlite3"]}
)
FORMULA = '=HYPERLINK("http://evil.example","x")'

def table(*names, value=1):
    return pa.Table.from_arrays([pa.array([value])] * len(names), names=list(names))

def raw(kind, *buffers, length=1):
    buffers = [None, *map(pa.py_buffer, buffers)]
    return pa.table({"raw": pa.Array.from_buffers(kind, length, buffers)})

MADE = {
    "injection": lambda: table('a"; DROP TABLE rows;--', "../../x", "[x]", "n\\nl", value=FORMULA),
    "letters": lambda: table("שלום", "\\u202e", "select", value="\\0'"),
    "long_name": lambda: table("n" * (1 << 20)),
    "nul": lambda: table("fine", "a\\0b"),
    "nul_in_a_batch": lambda: table("fine", "a\\0b").to_batches()[0],
    "nul_in_a_stream": lambda: table("fine", "a\\0b").to_reader(),
    "nul_in_a_frame": lambda: table("fine", "a\\0b").to_pandas(),
    "empty": lambda: table("fine", ""),
    "twice": lambda: table("twice", "twice"),
    "twins": lambda: table("Twin", "twiN"),
    "ours": lambda: table("_cf_job_id"),
    "wide": lambda: table(*(f"c{n}" for n in range(2500))),
    "union": lambda: pa.table({"odd": pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])], ["a"])}),
    "surrogate": lambda: raw(pa.string(), b"\\0\\0\\0\\0\\3\\0\\0\\0", b"\\xed\\xa0\\x80"),
    "overflow": lambda: raw(pa.decimal128(3, 0), (10**9).to_bytes(16, "little")),
    "days": lambda: raw(pa.date64(), (86_400_000 * 2**32).to_bytes(8, "little")),
    "lone": lambda: pa.table({"lone": ["\\ud800"]}),
}

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path) as file:
            self.publish("rows", MADE[file.read()]())
"""

KEPT: dict[str, dict[str, Any]] = {
    "injection": dict.fromkeys(
        ['a"; DROP TABLE rows;--', "../../x", "[x]", "n\nl"],
        '=HYPERLINK("http://evil.example","x")',
    ),
    "letters": dict.fromkeys(["שלום", "\u202e", "select"], "\0'"),
    "long_name": {"n" * (1 << 20): 1},
}
REFUSED = {
    **dict.fromkeys(
        ["nul", "nul_in_a_batch", "nul_in_a_stream", "nul_in_a_frame"],
        r"column name 'a\x00b' has a NUL character",
    ),
    "empty": "column name '' is empty",
    "twice": "column name 'twice' occurs twice",
    "twins": "column 'Twin'",
    "ours": "'_cf_job_id' is reserved",
    "wide": "from column 'c1996' on",
    "union": "column 'odd' (dense_union",
    "surrogate": "Invalid UTF8",
    "overflow": "does not fit in precision",
    "days": "column 'raw' (date64[ms])",
    "lone": "surrogates not allowed",
}


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, dict[str, Any]]]:
    """One run over a file for each; file -> its job."""
    folder = tmp_path_factory.mktemp("hostile outputs")
    settings = write_config(folder / "flow")
    once = msgspec.structs.replace(settings.jobs, max_attempts=1)
    settings = msgspec.structs.replace(settings, jobs=once)
    source = folder / "source"
    source.mkdir()
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        publish(ledger, settings, "hostile", PLUGIN, "1.0.0")
        for name in [*KEPT, *REFUSED]:
            (source / name).write_text(name)
        scan(ledger, root)
        assert sum(work_off(settings).values()) == len(KEPT) + len(REFUSED)
        yield settings, reasons(ledger)


def reasons(ledger: Ledger) -> dict[str, Any]:
    query = (
        select(FileLocation.rel_path, ProcessingJob.id, ProcessingJob.status, ProcessingJob.reason)
        .join(FileVersion, FileVersion.location_id == FileLocation.id)
        .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
    )
    return {row.rel_path: row for row in ledger.read(lambda c: c.execute(query).all())}


def in_parquet(home: Path) -> dict[int, dict[str, Any]]:
    rows = []
    for file in (home / "output" / "rows").rglob("*.parquet"):
        rows += ds.dataset(str(file)).to_table().to_pylist()
    return {row["_cf_job_id"]: row for row in rows}


def in_sqlite(home: Path) -> dict[int, dict[str, Any]]:
    with closing(sqlite3.connect(home / "tables.sqlite3")) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM rows")]
    return {row["_cf_job_id"]: row for row in rows}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.slow_cases("injection")
def test_what_both_sinks_keep_to_the_letter(
    worked: tuple[Settings, dict[str, Any]], name: str
) -> None:
    settings, jobs = worked
    for there in (in_parquet(settings.home), in_sqlite(settings.home)):
        row = there[jobs[name].id]
        own = {column: value for column, value in row.items() if not column.startswith("_cf_")}
        assert {c: v for c, v in own.items() if v is not None} == KEPT[name]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(worked: tuple[Settings, dict[str, Any]], name: str) -> None:
    _, jobs = worked
    assert jobs[name].status == "FAILED", jobs[name]
    assert REFUSED[name] in jobs[name].reason


def test_nothing_of_what_is_refused_is_there(worked: tuple[Settings, dict[str, Any]]) -> None:
    settings, jobs = worked
    kept = {jobs[name].id for name in KEPT}
    assert in_parquet(settings.home).keys() == kept
    assert in_sqlite(settings.home).keys() == kept
    for folder in (settings.home / "output", settings.home):
        stage = folder / ".casparian" / "stage"
        assert not [*stage.iterdir()], stage
    outside = {path.name for path in settings.home.parent.iterdir()}
    assert outside == {"flow", "source"}
