"""The audit's chain of hashes, and the seals: digests of the ledger's rows in that chain.

Each transaction of `db.access.Ledger` ends with one audit row, the seal of what it wrote. No verb
has to write it.

    versions, attempts   new rows, with the digest of each
    locations            new rows, with one digest for each run of ids
    outputs, jobs        new rows, their moves from state to state, and the digest of each
    setup and choices    each row that was added, changed or removed, with its digest

Versions, attempts and locations only grow, so new rows are those above the highest id at the start;
all else is noted by triggers on the writer's connection. The triggers are temporary objects of that
connection: what another program writes is in no seal, and `db.integrity` names it. What users edit
in sessions of their own (`SetupTable.edited`) is sealed as those sessions commit.

Nothing here imports SQLAlchemy, since the migration that begins the seals uses it too.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db.states import JOB_ARROWS, OUTPUT_ARROWS

# The chain: each row's hash covers the row and the hash before it, so altering or removing a row
# breaks the chain from there on (linked timestamps, Haber and Stornetta 1991).


GENESIS = "0" * 64
"""The hash before the first row."""


class Event(NamedTuple):
    """Something that a person or the system did, for the audit."""

    action: str
    """A verb: publish, commit, fail, add-source, ..."""
    subject: str
    """What it was done to: `job 7`, `plugin sales 1.0.0`."""
    detail: dict[str, Any]
    actor: str = ""
    """Who did it, where that is not whoever writes it down."""


class Head(NamedTuple):
    """The end of the chain. Keep a copy elsewhere to prove later that nothing before it changed."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def link(head: Head, actor: str, events: Iterable[Event]) -> list[dict[str, Any]]:
    """The rows that follow a head, one for each event, by column."""
    seq, previous = head
    at = datetime.now(UTC).replace(tzinfo=None).isoformat()
    rows = []
    for event in events:
        seq += 1
        row = {
            "seq": seq,
            "at": at,
            "actor": event.actor or actor,
            "action": event.action,
            "subject": event.subject,
            "detail": json.dumps(event.detail, sort_keys=True),
            "previous": previous,
        }
        previous = row["hash"] = _hash(row)
        rows.append(row)
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Whether a row has the hash that it names."""
    rest = {name: value for name, value in row.items() if name != "hash"}
    try:
        return bool(row["hash"] == _hash(rest))
    except TypeError:  # a tampered column of text may hold bytes
        return False


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


ACTION = "seal"

ROWS = "rows"
EARLIER, EARLIER_SETUP = "rows of an earlier release", "locations and setup of an earlier release"
"""The subject of a seal."""

DIGEST_BYTES = 24
"""Of a row's SHA-256: 192 bits, so finding two rows with the same digest takes 2^96 tries."""

SEALED_AT_ONCE = 2_000
"""Rows in one seal of a migration, so that an old ledger need not fit into memory."""


class SealedTable(NamedTuple):
    """A table whose rows are sealed."""

    name: str
    """Its glossary word, plural: `jobs`."""
    sql_name: str
    state: str = ""
    """The column with a row's state; empty where rows never change."""
    fence: str = "0"
    """The column that orders its moves, or 0."""
    fixed: tuple[str, ...] = ()
    """Columns that never change; empty: all. Do not edit: old seals have digests over these."""
    whole: tuple[str, ...] = ()
    """States in which every column is sealed."""
    arrows: dict[str, set[str]] = {}  # noqa: RUF012  a constant

    @property
    def one(self) -> str:
        """The word for one row."""
        return self.name[:-1]


SEALED_TABLES = (
    SealedTable("versions", "cf_file_version"),
    SealedTable("attempts", "cf_attempt"),
    SealedTable(
        "outputs", "cf_output", "state",
        fixed=("id", "job_id", "topic", "uri", "location", "mode", "output_key", "size_bytes"),
        whole=("PLANNED", "PUBLISHED", "REFUSED"), arrows=OUTPUT_ARROWS,
    ),
    SealedTable(
        "jobs", "cf_processing_queue", "status", "fence",
        fixed=("id", "file_version_id", "plugin_id", "plugin_name", "created_at"),
        # Before that, the reason and the time of a job's next attempt change without a move.
        whole=("COMPLETED", "FAILED", "ABORTED", "SUPERSEDED"), arrows=JOB_ARROWS,
    ),
)  # fmt: skip

GROWING = [table for table in SEALED_TABLES if not table.state]
MOVING = [table for table in SEALED_TABLES if table.state]

LOCATIONS, LOCATION_TABLE = "locations", "cf_file_location"
LOCATION_COLUMNS = "id, source_root_id, path, rel_path, discovered_at"
"""What never changes of a location. Do not edit: old seals have digests over these."""


class SetupTable(NamedTuple):
    """A table with few rows of which each may change: what was set up, or what a user chose."""

    name: str
    """Its word, plural."""
    sql_name: str
    key: tuple[str, ...] = ("id",)
    """The columns of its primary key: VACUUM may change other rowids."""
    label: str = "''"
    """SQL for what people call a row."""
    edited: bool = False
    """Users edit it in sessions of `get_engine`."""
    singular: str = ""
    """Where it is not the name without an s."""
    filled: str = ""
    """A column without which a row of the table says nothing, and is none of these."""

    @property
    def one(self) -> str:
        """The word for one row."""
        return self.singular or self.name[:-1]

    def has(self, row: str) -> str:
        """SQL for whether a row of the table is one of these."""
        return f"({row}.{self.filled} IS NOT NULL)" if self.filled else "TRUE"

    def key_of(self, row: str) -> str:
        """SQL for the key of a row: an integer, or text of several columns."""
        return " || '/' || ".join(f"{row}.{column}" for column in self.key)


SETUP_TABLES = (
    SetupTable("plugins", "cf_plugin", label="name || ' ' || version"),
    SetupTable("subscriptions", "cf_plugin_config", label="plugin_name", edited=True),
    SetupTable(
        "sinks of topics",
        "cf_topic_config",
        label="plugin_name || ' ' || topic_name",
        edited=True,
        singular="sink of a topic",
    ),
    SetupTable("routing rules", "cf_routing_rule", label="pattern", edited=True),
    SetupTable("source roots", "cf_source_root", label="name", edited=True),
    SetupTable("empty topics", "cf_empty_topic", ("plugin_name", "topic_name")),
    SetupTable("retracted versions", "cf_retracted_version", ("file_version_id",)),
    SetupTable("forgotten outputs", "cf_forgotten_output", ("output_key",)),
    SetupTable("left outputs", "cf_left_output", ("output_id",)),
    SetupTable("dismissed failures", "cf_dismissed_failure", ("job_id",)),
    SetupTable("rebuilds", "cf_rebuild", label="plugin_name"),
    SetupTable(
        "jobs of rebuilds", "cf_rebuild_job", ("rebuild_id", "job_id"), singular="job of a rebuild"
    ),
    SetupTable("epochs", "cf_epoch"),
    SetupTable("moves", "cf_gone_version", ("file_version_id",), filled="to_version_id"),
)

Marks = dict[str, int]
"""Table -> its highest id when the transaction began."""


def digest(values: Sequence[Any]) -> bytes:
    """The digest of a row, or of its fixed columns, in a seal.

    It hashes the Python literal of the tuple in ASCII, which distinguishes text, bytes, integers,
    floats and NULL, and where one column ends.
    """
    return hashlib.sha256(ascii(tuple(values)).encode()).digest()[:DIGEST_BYTES]


@contextlib.contextmanager
def exact(connection: sqlite3.Connection) -> Iterator[None]:
    """Decode invalid UTF-8 with surrogateescape instead of failing, while the block runs."""
    before = connection.text_factory
    connection.text_factory = _text
    try:
        yield
    finally:
        connection.text_factory = before


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def begin(connection: sqlite3.Connection) -> Marks:
    """Note what this transaction writes from here on; call it with the write lock held."""
    if not _has(connection, "cf_moved"):
        # Some of these are there where the connection was a session's before.
        for statement in (*_setup_triggers(SETUP_TABLES), *_triggers()):
            connection.execute(statement)
    return {
        name: connection.execute(f"SELECT coalesce(max(id), 0) FROM {name}").fetchone()[0]
        for name in (*(table.sql_name for table in GROWING), LOCATION_TABLE)
    }


def begin_session(connection: sqlite3.Connection) -> None:
    """Note what a user's session changes of the setup; call it with the write lock held."""
    if not _has(connection, "cf_touched"):
        for statement in _setup_triggers(table for table in SETUP_TABLES if table.edited):
            connection.execute(statement)


def _has(connection: sqlite3.Connection, table: str) -> bool:
    query = "SELECT 1 FROM sqlite_temp_master WHERE name = ?"
    return connection.execute(query, (table,)).fetchone() is not None


def _setup_triggers(tables: Iterable[SetupTable]) -> Iterator[str]:
    yield (
        "CREATE TEMP TABLE IF NOT EXISTS cf_touched "
        "(n INTEGER PRIMARY KEY, what TEXT, key, was INTEGER)"
    )
    for table in tables:
        old, new = table.key_of("OLD"), table.key_of("NEW")
        note = f"INSERT INTO cf_touched (what, key, was) SELECT '{table.name}',"
        for event, noted in (
            ("INSERT", f"{note} {new}, 0 WHERE {table.has('NEW')};"),
            (
                "UPDATE",
                f"{note} {old}, {table.has('OLD')} WHERE {table.has('OLD')} OR {table.has('NEW')}; "
                f"{note} {new}, 0 WHERE {new} IS NOT {old};",
            ),
            ("DELETE", f"{note} {old}, 1 WHERE {table.has('OLD')};"),
        ):
            yield (
                f"CREATE TEMP TRIGGER IF NOT EXISTS cf_seal_{table.sql_name}_{event} "
                f"AFTER {event} ON main.{table.sql_name} BEGIN {noted} END"
            )


def _triggers() -> Iterator[str]:
    yield (
        "CREATE TEMP TABLE cf_moved (n INTEGER PRIMARY KEY, what TEXT, id INTEGER, was TEXT, "
        "now TEXT, fence INTEGER)"
    )
    for table in GROWING:  # a version restored from a sink's record has its old id
        yield (
            f"CREATE TEMP TRIGGER cf_seal_{table.name} AFTER INSERT ON main.{table.sql_name} "
            f"WHEN NEW.id < (SELECT max(id) FROM main.{table.sql_name}) BEGIN "
            f"INSERT INTO cf_moved (what, id) VALUES ('{table.name}', NEW.id); END"
        )
    for table in MOVING:
        old, new = f"OLD.{table.state}", f"NEW.{table.state}"
        fence = table.fence if table.fence == "0" else f"NEW.{table.fence}"
        whole = ", ".join(f"'{state}'" for state in table.whole)
        for event, when, row in (
            ("INSERT", "TRUE", f"NEW.id, '', {new}, {fence}"),
            ("UPDATE", f"{old} <> {new} OR {new} IN ({whole})", f"NEW.id, {old}, {new}, {fence}"),
            ("DELETE", "TRUE", f"OLD.id, {old}, '', 0"),
        ):
            yield (
                f"CREATE TEMP TRIGGER cf_seal_{table.name}_{event} "
                f"AFTER {event} ON main.{table.sql_name} WHEN {when} BEGIN "
                "INSERT INTO cf_moved (what, id, was, now, fence) "
                f"VALUES ('{table.name}', {row}); END"
            )


def seal(connection: sqlite3.Connection, marks: Marks) -> None:
    """Write the seal of the transaction into the audit, just before the commit."""
    sealed = {}
    with exact(connection):
        for table in GROWING:
            # UNION, since SQLite would scan the whole table for an OR.
            new = (
                f"id IN (SELECT id FROM {table.sql_name} WHERE id > {marks[table.sql_name]} "
                f"UNION SELECT id FROM cf_moved WHERE what = '{table.name}')"
            )
            sealed[table.name] = _sealed(connection, table, [], new, "")
        sealed[LOCATIONS] = _blocks(connection, f"id > {marks[LOCATION_TABLE]}")
        for table in MOVING:
            moves = connection.execute(
                "SELECT id, was, now, fence FROM cf_moved WHERE what = ? ORDER BY n",
                (table.name,),
            ).fetchall()
            if moves:
                ids = f"id IN (SELECT id FROM cf_moved WHERE what = '{table.name}'"
                sealed[table.name] = _sealed(
                    connection, table, moves, f"{ids} AND was = '')", f"{ids})"
                )
        sealed |= _setup(connection)
    _append(connection, ROWS, sealed)
    connection.execute("DELETE FROM cf_moved")
    connection.execute("DELETE FROM cf_touched")


def seal_session(connection: sqlite3.Connection) -> None:
    """Seal what a user's session changed of the setup, just before the commit."""
    with exact(connection):
        _append(connection, ROWS, _setup(connection))
    connection.execute("DELETE FROM cf_touched")


def seal_existing_rows(connection: sqlite3.Connection) -> None:
    """Seal every row, once, in the migration that begins the seals."""
    for table in SEALED_TABLES:
        for within in _chunks(connection, table.sql_name):
            with exact(connection):
                moves = connection.execute(
                    f"SELECT id, '', {table.state}, {table.fence} FROM {table.sql_name} "
                    f"WHERE {within} ORDER BY id"
                ).fetchall() if table.state else []  # fmt: skip
                part = _sealed(connection, table, moves, within, within)
            _append(connection, EARLIER, {table.name: part})


def seal_existing_setup(connection: sqlite3.Connection) -> None:
    """Seal every location and the setup, once, in the migration that begins their seals."""
    for within in _chunks(connection, LOCATION_TABLE):
        with exact(connection):
            part = _blocks(connection, within)
        _append(connection, EARLIER_SETUP, {LOCATIONS: part})
    for table in SETUP_TABLES:
        for within in _chunks(connection, table.sql_name, "rowid"):
            with exact(connection):
                found = _setup_rows(connection, table, f"t.{within}")
                part = _touched([(row[0], 0) for row in found], found)
            _append(connection, EARLIER_SETUP, {table.name: part})


def _chunks(connection: sqlite3.Connection, table: str, number: str = "id") -> Iterator[str]:
    """Conditions that take the rows of a table `SEALED_AT_ONCE` at a time, in order."""
    low = -(1 << 63)
    while True:
        (high,) = connection.execute(
            f"SELECT max(n) FROM (SELECT {number} AS n FROM {table} WHERE {number} > ? "
            f"ORDER BY {number} LIMIT ?)",
            (low, SEALED_AT_ONCE),
        ).fetchone()
        if high is None:
            return
        yield f"{number} BETWEEN {low + 1} AND {high}"
        low = high


def _sealed(
    connection: sqlite3.Connection,
    table: SealedTable,
    moves: list[tuple[Any, ...]],
    born: str,
    changed: str,
) -> dict[str, Any]:
    """What a seal says about a table.

    Args:
        born: condition of the rows that are new.
        changed: condition of the rows that moved.
    """
    columns = ", ".join(table.fixed) or "*"
    part: dict[str, Any] = {
        "moves": _in_runs(moves),
        "born": _digests(
            connection, f"SELECT {columns} FROM {table.sql_name} WHERE {born} ORDER BY id"
        ),
    }
    if changed and table.whole:
        states = ", ".join(f"'{state}'" for state in table.whole)
        part["whole"] = _digests(
            connection,
            f"SELECT * FROM {table.sql_name} WHERE {changed} AND {table.state} IN ({states}) "
            "ORDER BY id",
        )
    return {name: value for name, value in part.items() if value}


def _blocks(connection: sqlite3.Connection, which: str) -> dict[str, Any]:
    """What a seal says of locations: [first id, last id, digest] of each run of ids."""
    rows = connection.execute(
        f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLE} WHERE {which} ORDER BY id"
    ).fetchall()
    if not rows:
        return {}
    blocks, start = [], 0
    for low, high in _runs([row[0] for row in rows]):
        end = start + high - low + 1
        blocks.append([low, high, block_digest(rows[start:end])])
        start = end
    return {"blocks": blocks}


def block_digest(rows: Sequence[tuple[Any, ...]]) -> str:
    """The digest of a run of rows: half the cost of a digest of each."""
    return text_of(hashlib.sha256(ascii(list(rows)).encode()).digest())


def text_of(data: bytes) -> str:
    """A digest, as a seal has it."""
    return base64.b64encode(data[:DIGEST_BYTES]).decode()


def _setup(connection: sqlite3.Connection) -> dict[str, Any]:
    """What a seal says of the setup: table -> its rows that were touched."""
    touched: dict[str, list[tuple[Any, int]]] = {}
    for what, key, was, _ in connection.execute(
        # SQLite takes a group's other columns from the row with its minimum.
        "SELECT what, key, was, min(n) FROM cf_touched GROUP BY what, key"
    ):
        touched.setdefault(what, []).append((key, was))
    return {
        table.name: _touched(
            touched[table.name],
            _setup_rows(
                connection,
                table,
                f"{table.key_of('t')} IN (SELECT key FROM cf_touched WHERE what = '{table.name}')",
            ),
        )
        for table in SETUP_TABLES
        if table.name in touched
    }


def _setup_rows(
    connection: sqlite3.Connection, table: SetupTable, which: str
) -> list[tuple[Any, ...]]:
    """The key of each row, and the row."""
    return connection.execute(
        f"SELECT {table.key_of('t')}, t.* FROM {table.sql_name} t "
        f"WHERE {which} AND {table.has('t')} ORDER BY 1"
    ).fetchall()


def _touched(touched: Iterable[tuple[Any, int]], rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """[key, whether it was there before, digest; empty where it is gone] of each row."""
    now = {row[0]: text_of(digest(row[1:])) for row in rows}
    entries = [[key, was, now.get(key, "")] for key, was in touched]
    entries = [entry for entry in entries if entry[1] or entry[2]]
    return {"columns": len(rows[0]) - 1 if rows else 0, "rows": entries} if entries else {}


def _digests(connection: sqlite3.Connection, query: str) -> dict[str, Any]:
    """The digests of rows whose first column is their id; empty where there are none."""
    cursor = connection.execute(query)
    rows = cursor.fetchall()
    if not rows:
        return {}
    return {
        "ids": _runs([row[0] for row in rows]),
        "columns": len(cursor.description),
        "digests": base64.b64encode(b"".join(map(digest, rows))).decode(),
    }


def _runs(ids: list[int]) -> list[list[int]]:
    """Ascending ids as [first, last] runs; those of a scan are one run."""
    if ids[-1] - ids[0] + 1 == len(ids):
        return [[ids[0], ids[-1]]]
    return _in_runs((row_id,) for row_id in ids)


def _in_runs(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Rows (id, ...) as runs [first id, last id, ...] of adjacent ids with the same rest."""
    runs: list[list[Any]] = []
    for number, *rest in rows:
        if runs and runs[-1][1] + 1 == number and runs[-1][2:] == rest:
            runs[-1][1] = number
        else:
            runs.append([number, number, *rest])
    return runs


def _append(connection: sqlite3.Connection, subject: str, sealed: dict[str, Any]) -> None:
    detail = {name: part for name, part in sealed.items() if part}
    if not detail:
        return
    last = connection.execute("SELECT seq, hash FROM cf_audit ORDER BY seq DESC LIMIT 1").fetchone()
    head = Head(*last) if last else Head(0, GENESIS)
    (row,) = link(head, "ledger", [Event(ACTION, subject, detail)])
    connection.execute(f"INSERT INTO cf_audit ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)
    crashpoint("seals.sealed")
