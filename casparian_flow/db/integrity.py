"""The rows of the ledger against its audit, and the rules that hold in it whatever happened.

Replaying the seals: do the rows of the ledger follow from the audit?

The seals are read in order into a scratch database, which is then merged with the tables by id,
one row at a time, so that no table need fit into memory. Of each row must hold:

    it is in a seal, and each row in a seal exists
    it was written once; or each of its moves starts where the last one ended, and is allowed
    a job's fence goes up with each claim, and never down
    its state and fence are those of its last move
    its values have the digests that the seals have
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from casparian_flow.db import schema
from casparian_flow.db.access import Connection, driver
from casparian_flow.db.schema import Made
from casparian_flow.db.seals import (
    DIGEST_BYTES,
    EARLIER,
    EARLIER_SETUP,
    LOCATION_COLUMNS,
    LOCATION_TABLE,
    LOCATIONS,
    SEALED_TABLES,
    SETUP_TABLES,
    SealedTable,
    SetupTable,
    block_digest,
    digest,
    exact,
    text_of,
)

_LONGEST_RUN = 1_000_000
"""Ids in one run of a seal, at most; no transaction of ours writes more."""


class _Digests(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[tuple[int, int]] = []
    columns: int = 0
    digests: str = ""


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """What one seal says about one table."""

    moves: list[tuple[int, int, str, str, int]] = []
    born: _Digests = msgspec.field(default_factory=_Digests)
    whole: _Digests = msgspec.field(default_factory=_Digests)
    blocks: list[tuple[int, int, str]] = []
    """Of locations: first id, last id, digest."""
    columns: int = 0
    rows: list[tuple[int | str, int, str]] = []
    """Of the setup: key, whether it was there before, digest."""


class _Entry(NamedTuple):
    """What one seal says about one row: a move, or a digest."""

    seq: int
    kind: str
    was: str
    now: str
    fence: int
    columns: int
    digest: bytes
    earlier: int
    """Whether the migration that began the seals wrote it."""


def report_damage(what: str, problems: Iterable[str]) -> Iterator[str]:
    """These problems; where the database is too damaged to go on, that as the last one."""
    try:
        yield from problems
    except (sqlite3.Error, ValueError, TypeError) as error:
        yield f"{what} cannot be read to the end; the database is damaged: {error}"


def seal_problems(connection: Connection) -> Iterator[str]:
    """A sentence for each row that differs from its seals."""
    with contextlib.closing(sqlite3.connect("")) as scratch, exact(driver(connection)):
        scratch.execute(
            "CREATE TABLE entry (what TEXT, id INTEGER, seq INTEGER, kind TEXT, was TEXT, "
            "now TEXT, fence INTEGER, columns INTEGER, digest BLOB, earlier INTEGER)"
        )
        scratch.execute(
            "CREATE TABLE block (first INTEGER, last INTEGER, seq INTEGER, digest TEXT)"
        )
        scratch.execute(
            "CREATE TABLE setup (what TEXT, key BLOB, seq INTEGER, was INTEGER, columns INTEGER, "
            "digest TEXT)"
        )
        yield from report_damage("the seals", _read(connection, scratch))
        for table in SEALED_TABLES:
            yield from report_damage(f"the {table.name}", _compare(connection, scratch, table))
        yield from report_damage("the locations", _compare_locations(connection, scratch))
        for setup in SETUP_TABLES:
            yield from report_damage(
                f"the {setup.name}", _compare_setup(connection, scratch, setup)
            )


def since(connection: Connection) -> Iterator[str]:
    """From when on rows are sealed, of those that were not from the beginning."""
    query = "SELECT min(seq), max(seq), max(at) FROM cf_audit WHERE action = 'seal' AND subject = ?"
    for subject in (EARLIER, EARLIER_SETUP):
        first, last, at = driver(connection).execute(query, (subject,)).fetchone()
        if first is not None:
            yield (
                f"{subject} were sealed on {at[:19]}Z (audit rows {first} to {last}); changes "
                "made to them before that cannot be detected"
            )


def in_short(detail: str) -> str:
    """A seal's detail for people: `3 versions, 3 jobs`; as it is where it cannot be read."""
    try:
        parts = msgspec.json.decode(detail, type=dict[str, _Part])
        sealed = {
            name: {row_id for row_id, _ in _entries(0, part, 0)}
            | {key for key, _, _ in part.rows}
            | set(_ids((first, last) for first, last, _ in part.blocks))
            for name, part in parts.items()
        }
    except (msgspec.MsgspecError, ValueError):
        return detail
    one = {table.name: table.one for table in (*SEALED_TABLES, *SETUP_TABLES)}
    return ", ".join(
        f"{len(ids)} {name if len(ids) > 1 else one.get(name, name[:-1])}"
        for name, ids in sealed.items()
    )


def _read(connection: Connection, scratch: sqlite3.Connection) -> Iterator[str]:
    """Read the seals into the scratch database; a sentence for each that cannot be read."""
    rows = connection.exec_driver_sql(
        "SELECT seq, subject, detail FROM cf_audit WHERE action = 'seal' ORDER BY seq"
    )
    for seq, subject, detail in rows:
        try:
            parts = msgspec.json.decode(detail, type=dict[str, _Part])
            entries = [
                (name, row_id, *entry)
                for name, part in parts.items()
                for row_id, entry in _entries(seq, part, int(subject == EARLIER))
            ]
            setup = [
                (name, str(key).encode(), seq, was, part.columns, hashed)
                for name, part in parts.items()
                for key, was, hashed in part.rows
            ]
            blocks = [
                (first, last, seq, hashed)
                for first, last, hashed in parts.get(LOCATIONS, _Part()).blocks
                if _length(first, last)
            ]
        except (msgspec.MsgspecError, ValueError) as error:
            yield f"audit row {seq} is a seal that cannot be read: {error}"
            continue
        scratch.executemany("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", entries)
        scratch.executemany("INSERT INTO setup VALUES (?, ?, ?, ?, ?, ?)", setup)
        scratch.executemany("INSERT INTO block VALUES (?, ?, ?, ?)", blocks)


def _entries(seq: int, part: _Part, earlier: int) -> Iterator[tuple[int, _Entry]]:
    for first, last, was, now, fence in part.moves:
        for row_id in _ids([(first, last)]):
            yield row_id, _Entry(seq, "move", was, now, fence, 0, b"", earlier)
    for kind, digests in (("born", part.born), ("whole", part.whole)):
        ids = _ids(digests.ids)
        data = base64.b64decode(digests.digests, validate=True)
        if len(data) != len(ids) * DIGEST_BYTES:
            raise ValueError(f"it has {len(ids)} rows and {len(data)} bytes of digests")
        for n, row_id in enumerate(ids):
            hashed = data[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]
            yield row_id, _Entry(seq, kind, "", "", 0, digests.columns, hashed, earlier)


def _ids(runs: Iterable[tuple[int, int]]) -> list[int]:
    ids: list[int] = []
    for first, last in runs:
        if _length(first, last):
            ids += range(first, last + 1)
    return ids


def _length(first: int, last: int) -> int:
    """How many ids there are in a run; no seal of ours has a longer one, or an empty one.

    Raises:
        ValueError: this one is.
    """
    if not 0 <= last - first < _LONGEST_RUN:
        raise ValueError(f"it has a run from {first} to {last}")
    return last - first + 1


class _Columns(NamedTuple):
    """The columns of a sealed table, in order, and the default of each."""

    names: list[str]
    defaults: list[Any]


def _compare(
    connection: Connection, scratch: sqlite3.Connection, table: SealedTable
) -> Iterator[str]:
    """Merge the seals of a table with its rows, by id, and judge each row."""
    columns = _columns(connection, table.sql_name)
    sealed = scratch.execute(
        "SELECT id, seq, kind, was, now, fence, columns, digest, earlier FROM entry "
        "WHERE what = ? ORDER BY id, rowid",
        (table.name,),
    )
    rows = connection.exec_driver_sql(f"SELECT * FROM {table.sql_name} ORDER BY id")
    both = heapq.merge(
        ((row[0], _Entry._make(row[1:])) for row in sealed),
        ((row[0], tuple(row)) for row in rows),
        key=itemgetter(0),
    )
    for row_id, group in groupby(both, key=itemgetter(0)):
        items = [item for _, item in group]
        entries = [item for item in items if isinstance(item, _Entry)]
        row = next((item for item in items if not isinstance(item, _Entry)), None)
        for problem in _judge(table, columns, entries, row):
            yield f"{table.one} {row_id} {problem}"


def _columns(connection: Connection, table: str) -> _Columns:
    info = connection.exec_driver_sql(f"PRAGMA table_info({table})").all()
    defaults = [row[4] or "NULL" for row in info]
    values = connection.exec_driver_sql(f"SELECT {', '.join(defaults)}").one()
    return _Columns([row[1] for row in info], list(values))


def _judge(
    table: SealedTable, columns: _Columns, entries: Sequence[_Entry], row: tuple[Any, ...] | None
) -> Iterator[str]:
    """What is wrong with one row, given its entries in the order of the seals."""
    if not entries:
        yield "was inserted outside Casparian Flow: it has no audit record"
        return
    moves = [entry for entry in entries if entry.kind == "move"]
    born = [entry for entry in entries if entry.kind == "born"]
    whole = [entry for entry in entries if entry.kind == "whole"]
    if not table.state:
        state: str | None = None
        if len(born) > 1:
            yield f"was created twice, by audit rows {born[0].seq} and {born[1].seq}"
    else:
        yield from _wrong_moves(table, moves)
        state = moves[-1].now if moves else ""
    if row is None:
        if state != "":
            yield f"was deleted outside Casparian Flow: audit row {entries[-1].seq} has it"
        return
    if state == "":
        yield "was inserted outside Casparian Flow: the audit has it as deleted"
        return
    values = dict(zip(columns.names, row, strict=True))
    if state is not None:
        yield from _unsealed_move(table, moves[-1], values)
    fixed = [values[name] for name in table.fixed] or list(row)
    if not born or not _matches(born[-1], fixed, columns.defaults):
        yield "was changed outside Casparian Flow"
    elif state in table.whole:
        if not whole or whole[-1].seq != moves[-1].seq:
            yield f"has no audit record of becoming {state}"
        elif not _matches(whole[-1], list(row), columns.defaults):
            yield f"was changed outside Casparian Flow since it became {state}"


def _wrong_moves(table: SealedTable, moves: Sequence[_Entry]) -> Iterator[str]:
    """Moves that start where the last one did not end, that are not allowed, or whose fence is
    not greater."""
    state, fence = "", 0
    for move in moves:
        place = f"audit row {move.seq}"
        if move.was != state:
            yield (
                f"is moved from {move.was or 'nothing'} by {place}, but was "
                f"{state or 'not there'} before it"
            )
        elif not move.earlier and move.now not in table.arrows.get(move.was, ()):
            arrow = f"from {move.was or 'nothing'} to {move.now or 'nothing'}"
            yield f"is moved {arrow} by {place}, which is not an allowed move"
        claimed = table.fence != "0" and move.now == "RUNNING"
        if move.was and move.fence < fence + claimed:
            yield f"is moved to {move.now} with fence {move.fence} by {place}, after fence {fence}"
        state, fence = move.now, move.fence


def _unsealed_move(table: SealedTable, last: _Entry, values: dict[str, Any]) -> Iterator[str]:
    if values[table.state] != last.now:
        yield (
            f"is {values[table.state]!s}, but audit row {last.seq} has it {last.now}: it was "
            "changed outside Casparian Flow"
        )
    elif table.fence in values and values[table.fence] != last.fence:
        yield f"has fence {values[table.fence]!s}, but audit row {last.seq} has {last.fence}"


def _matches(entry: _Entry, values: list[Any], defaults: Sequence[Any]) -> bool:
    """Whether values have the digest of a seal; columns added since must have their defaults."""
    later = slice(entry.columns, len(values))
    same = digest(values[: entry.columns]) == entry.digest
    return same and values[later] == list(defaults[later])


# Locations, sealed in runs.


def _compare_locations(connection: Connection, scratch: sqlite3.Connection) -> Iterator[str]:
    """Merge the runs of the seals with the locations, by id."""
    blocks = scratch.execute("SELECT first, last, seq, digest FROM block ORDER BY first, seq")
    rows = iter(
        driver(connection).execute(f"SELECT {LOCATION_COLUMNS} FROM {LOCATION_TABLE} ORDER BY id")
    )
    row = next(rows, None)
    end = 0
    for first, last, seq, hashed in blocks:
        if first <= end:
            yield f"locations {first} to {last} were created twice, once by audit row {seq}"
            continue
        end = last
        while row is not None and row[0] < first:
            yield _inserted("location", row[0], row[3])
            row = next(rows, None)
        found = []
        while row is not None and row[0] <= last:
            found.append(tuple(row))
            row = next(rows, None)
        yield from _wrong_block(first, last, seq, hashed, found)
    while row is not None:
        yield _inserted("location", row[0], row[3])
        row = next(rows, None)


def _wrong_block(
    first: int, last: int, seq: int, hashed: str, rows: Sequence[tuple[Any, ...]]
) -> Iterator[str]:
    if block_digest(rows) == hashed:
        return
    gone = set(range(first, last + 1)) - {row[0] for row in rows}
    for row_id in sorted(gone):
        yield f"location {row_id} was deleted outside Casparian Flow: audit row {seq} has it"
    if not gone:
        which = f"location {first}"
        if first != last:
            which = f"a location from {first} to {last}"
        yield f"{which} was changed outside Casparian Flow: audit row {seq} has it otherwise"


def _inserted(one: str, key: object, label: object = "") -> str:
    named = f" ({label})" if label else ""
    return f"{one} {key}{named} was inserted outside Casparian Flow: it has no audit record"


# The setup and what users chose: the last seal of a row has it as it is.


class _Setup(NamedTuple):
    """What one seal says about one row of the setup."""

    seq: int
    was: int
    columns: int
    digest: str


def _compare_setup(
    connection: Connection, scratch: sqlite3.Connection, table: SetupTable
) -> Iterator[str]:
    """Merge the seals of a table of the setup with its rows, by key, and judge each row."""
    defaults = _columns(connection, table.sql_name).defaults
    sealed = scratch.execute(
        "SELECT key, seq, was, columns, digest FROM setup WHERE what = ? ORDER BY key, rowid",
        (table.name,),
    )
    rows = driver(connection).execute(
        f"SELECT CAST({table.key_of('t')} AS BLOB), {table.label}, t.* "
        f"FROM {table.sql_name} t WHERE {table.has('t')} ORDER BY 1"
    )
    both = heapq.merge(
        ((row[0], _Setup._make(row[1:])) for row in sealed),
        ((row[0], tuple(row[1:])) for row in rows),
        key=itemgetter(0),
    )
    for key, group in groupby(both, key=itemgetter(0)):
        items = [item for _, item in group]
        entries = [item for item in items if isinstance(item, _Setup)]
        row = next((item for item in items if not isinstance(item, _Setup)), None)
        named = f"{table.one} {key.decode('utf-8', 'backslashreplace')}"
        if row is not None and row[0]:
            named += f" ({row[0]})"
        values = None if row is None else list(row[1:])
        for problem in _judge_setup(entries, values, defaults):
            yield f"{named} {problem}"


def _judge_setup(
    entries: Sequence[_Setup], values: list[Any] | None, defaults: Sequence[Any]
) -> Iterator[str]:
    """What is wrong with one row of the setup, given its entries in the order of the seals."""
    is_there = False
    for entry in entries:
        if bool(entry.was) != is_there:
            what = "deleted" if is_there else "inserted"
            yield f"was {what} outside Casparian Flow, before audit row {entry.seq}"
        is_there = bool(entry.digest)
    if values is None:
        if is_there:
            yield f"was deleted outside Casparian Flow: audit row {entries[-1].seq} has it"
    elif not entries:
        yield "was inserted outside Casparian Flow: it has no audit record"
    elif not is_there:
        yield "was inserted outside Casparian Flow: the audit has it as deleted"
    else:
        last = entries[-1]
        same = text_of(digest(values[: last.columns])) == last.digest
        if not same or values[last.columns :] != list(defaults[last.columns :]):
            yield f"was changed outside Casparian Flow: audit row {last.seq} has it otherwise"


# The schema: constraints and triggers that protect the rows, and nothing that runs beside them.


def schema_problems(connection: Connection) -> Iterator[str]:
    """A sentence for each part of the schema that the migrations did not make so.

    What a user adds beside it is no problem, but for what would run in Casparian Flow's own
    transactions or refuse its rows: a trigger or a unique index on one of its tables.
    """
    wanted = {(made.kind, made.name): made for made in schema.made_by_migrations()}
    tables = {made.table.lower() for made in wanted.values()}
    found = schema.objects(driver(connection))
    for made in found:
        ours = wanted.pop((made.kind, made.name), None)
        if ours is None and made.table.lower() in tables and _interferes(made):
            yield (
                f"{made.kind} {made.name} on {made.table} was added outside Casparian Flow: it "
                "acts on what Casparian Flow writes"
            )
        elif ours is not None and ours != made:
            yield f"{made.kind} {made.name} is not as Casparian Flow made it"
    for kind, name in wanted:
        yield f"{kind} {name} is missing in the database"


def _interferes(made: Made) -> bool:
    return made.kind != "index" or made.sql.upper().startswith("CREATE UNIQUE")


# Invariants of the ledger: message -> a query that returns the rows which break it.


# What the audit says was adopted from sinks, as runs of ids: those jobs have not run here, and no
# sink knows the versions that gave no output. An earlier release wrote only the last version's id.

_ADOPTED = """
    SELECT json_extract(run.value, '$[0]') AS first, json_extract(run.value, '$[1]') AS last
    FROM cf_audit a,
         json_each(CASE WHEN json_valid(a.detail) THEN a.detail ELSE '{{}}' END, '$.{what}') run
    WHERE a.action = 'adopt'
"""

_ADOPTED_VERSIONS = f"""
    {_ADOPTED.format(what="versions")}
    UNION ALL
    SELECT 1, json_extract(detail, '$.last_version_id') FROM cf_audit
    WHERE action = 'adopt' AND json_valid(detail)
      AND json_type(detail, '$.last_version_id') = 'integer'
"""

_INVARIANTS = {
    "location {0} ({1}): its versions are not numbered 1, 2, 3, ...": f"""
        WITH adopted AS MATERIALIZED ({_ADOPTED_VERSIONS})
        SELECT l.id, l.rel_path FROM cf_file_version v JOIN cf_file_location l
        ON l.id = v.location_id
        GROUP BY l.id HAVING (min(v.ordinal) <> 1 OR max(v.ordinal) <> count(*))
        AND NOT EXISTS (
            SELECT 1 FROM cf_file_version w JOIN adopted ON w.id BETWEEN first AND last
            WHERE w.location_id = l.id)
        """,
    "location {0} ({1}): its current version is not its latest one": """
        SELECT l.id, l.rel_path FROM cf_file_location l
        WHERE l.current_version_id IS NOT (
            SELECT v.id FROM cf_file_version v WHERE v.location_id = l.id
            ORDER BY v.ordinal DESC LIMIT 1)
        """,
    "job {0} is COMPLETED, but its output {1} is {2}": """
        SELECT j.id, o.topic, o.state FROM cf_processing_queue j
        JOIN cf_output o ON o.job_id = j.id
        WHERE j.status = 'COMPLETED' AND o.state <> 'PUBLISHED'
        """,
    "job {0} is {1}, but none of its attempts staged an output": f"""
        WITH adopted AS MATERIALIZED ({_ADOPTED.format(what="jobs")})
        SELECT j.id, j.status FROM cf_processing_queue j
        WHERE j.status IN ('COMPLETED', 'COMMITTING') AND NOT EXISTS (
            SELECT 1 FROM cf_attempt a
            WHERE a.job_id = j.id AND a.outcome = 'STAGED'
              AND (a.fence = j.fence OR EXISTS (  -- it was put back after the attempt of a rebuild
                  SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
                  WHERE m.job_id = j.id AND m.generation > j.generation
                    AND b.ended_at IS NOT NULL)))
        AND NOT (j.status = 'COMPLETED' AND EXISTS (
            SELECT 1 FROM adopted WHERE j.id BETWEEN first AND last))
        """,
    "job {0} has an attempt {1}, but was never claimed for it": """
        SELECT j.id, a.fence FROM cf_processing_queue j JOIN cf_attempt a ON a.job_id = j.id
        WHERE a.fence > j.fence
        """,
    "the store counts {0} contents, but the ledger has {1}": """
        SELECT contents, (SELECT count(*) FROM cf_kept_content) AS rows FROM cf_store
        WHERE contents <> rows
        """,
    "job {0} is {1} without a reason": """
        SELECT id, status FROM cf_processing_queue
        WHERE status IN ('FAILED', 'SUPERSEDED') AND reason = ''
        """,
    "job {0} is FAILED, but no attempt and no audit row records that": """
        SELECT j.id FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
        AND NOT EXISTS (SELECT 1 FROM cf_attempt a WHERE a.job_id = j.id AND a.fence = j.fence)
        AND 'job ' || j.id NOT IN (SELECT subject FROM cf_audit WHERE action IN ('fail', 'refuse'))
        """,
    "job {0} is COMPLETED, but the audit has no commit of it": f"""
        WITH adopted AS MATERIALIZED ({_ADOPTED.format(what="jobs")})
        SELECT substr(subject, 5) FROM (
            SELECT 'job ' || id AS subject FROM cf_processing_queue WHERE status = 'COMPLETED'
            EXCEPT SELECT subject FROM cf_audit WHERE action = 'commit')
        WHERE NOT EXISTS (
            SELECT 1 FROM adopted WHERE CAST(substr(subject, 5) AS INTEGER) BETWEEN first AND last)
        """,
    "row {1} of {0} refers to a missing row of {2}": "PRAGMA foreign_key_check",
}


def broken_invariants(connection: Connection) -> Iterator[str]:
    """A sentence for each row that breaks an invariant, and for each damaged page."""
    for message, query in _INVARIANTS.items():
        yield from report_damage("the ledger", _broken(connection, message, query))
    for (problem,) in connection.execute("PRAGMA integrity_check"):
        if problem != "ok":
            yield f"the database is damaged: {problem}"


def _broken(connection: Connection, message: str, query: str) -> Iterator[str]:
    for row in connection.execute(query):
        yield message.format(*row)


def damage(connection: Connection) -> str:
    """What is wrong with the database's pages, by SQLite's quick check; else empty."""
    problem: str = connection.execute("PRAGMA quick_check(1)").scalar_one()
    return "" if problem == "ok" else problem


def running_jobs(connection: Connection) -> Iterator[str]:
    """A sentence for each RUNNING job; call it only while no daemon runs."""
    query = "SELECT id FROM cf_processing_queue WHERE status = 'RUNNING'"
    for job_id in connection.execute(query).scalars():
        yield (
            f"job {job_id} is RUNNING, but no daemon runs (casparian start puts it back "
            "into the queue)"
        )


def sizes(connection: Connection) -> dict[str, int]:
    """How many rows there are to check, by kind."""
    tables = {
        "locations": "SELECT count(*) FROM cf_file_location",
        "versions": "SELECT count(*) FROM cf_file_version",
        "jobs": "SELECT count(*) FROM cf_processing_queue",
        "attempts": "SELECT count(*) FROM cf_attempt",
        "audit rows": "SELECT count(*) FROM cf_audit",
        "kept contents": "SELECT count(*) FROM cf_kept_content",
    }
    return {name: connection.execute(query).scalar_one() for name, query in tables.items()}
