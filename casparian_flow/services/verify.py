"""Every claim of the ledger, checked: against itself, its audit, its signatures and its sinks."""

from __future__ import annotations

import base64
import contextlib
import heapq
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import audit, outputs, plugins, seals, trust
from casparian_flow.db import found as found_outputs
from casparian_flow.db.access import Ledger, driver
from casparian_flow.db.seals import DIGEST_BYTES, EARLIER, SEALED_TABLES, SealedTable, digest, exact
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.services import snapshots

Claims = dict[str, list[Claim]]
"""Location of a sink -> what the ledger says is there."""


@dataclass
class Verdict:
    """What was looked at, and what does not hold."""

    checked: dict[str, int] = field(default_factory=dict)
    """What -> how many of it."""
    problems: list[str] = field(default_factory=list)
    """A sentence each; empty where everything holds."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, though nothing is wrong with it."""


def verify(settings: Settings, ledger: Ledger) -> Verdict:
    """Check everything. Reads every byte of every published file and snapshot; changes nothing.

    It may run beside a daemon: what the ledger claimed when this began is what is checked. A
    ledger that is damaged is read as far as it can be.
    """
    verdict, claims = ledger.read(check_ledger)
    if durable.daemon_lock_holder(settings.database.daemon_lock) is None:
        running = ledger.read(lambda c: list(report_damage("the jobs", running_jobs(c))))
        verdict.problems += running
    verdict.checked["outputs"] = sum(map(len, claims.values()))
    verdict.checked["rows"] = sum(claim.rows for group in claims.values() for claim in group)
    for location, group in claims.items():
        verdict.problems += _check_sink(ledger, location, group)
    verdict.problems += snapshots.problems(ledger)
    return verdict


def check_ledger(connection: Connection) -> tuple[Verdict, Claims]:
    """One snapshot of the ledger: its breaks, and what it claims of each sink."""
    verdict, claims = Verdict(), defaultdict[str, list[Claim]](list)
    with seals.exact(driver(connection)):
        for what, found in (
            ("the ledger", _count(connection, verdict)),
            ("the ledger", broken_invariants(connection)),
            ("the audit", audit.problems(connection)),
            ("the seals", seal_problems(connection)),
            ("the plugins", _faults(connection, verdict)),
            ("the outputs", _claims(connection, claims)),
        ):
            verdict.problems += report_damage(what, found)
    # Damage is met by many questions.
    verdict.problems = list(dict.fromkeys(verdict.problems))
    return verdict, claims


def _count(connection: Connection, verdict: Verdict) -> Iterator[str]:
    verdict.checked.update(sizes(connection))
    verdict.notes += filter(None, [since(connection)])
    yield from ()


def _faults(connection: Connection, verdict: Verdict) -> Iterator[str]:
    """What is wrong with the trust log and with each artifact.

    That somebody disabled an artifact or revoked its key is not; nor that an earlier release signed
    it in its own form, where the audit has its bytes: it may not run, and that is noted.
    """
    trusted = trust.read(connection)
    artifacts = plugins.stored(connection)
    verdict.checked |= {"plugins": len(artifacts), "trust statements": trusted.seq}
    yield from filter(None, [trusted.broken])
    for plugin in artifacts:
        if words := plugins.fault(plugin, trusted):
            about = f"plugin {plugin.name} {plugin.version}: {words}"
            if not trusted.broken and plugins.from_earlier(connection, plugin):
                verdict.notes.append(f"{about}; it may not run")
            else:
                yield about


def _claims(connection: Connection, claims: Claims) -> Iterator[str]:
    """Collect what can be asked of the sinks; rows that make no sense were named already."""
    for row in [*outputs.published(connection), *found_outputs.expected(connection)]:
        if isinstance(row.rows, int) and isinstance(row.location, str):
            claim = Claim(
                topic=row.topic,
                output_key=row.output_key,
                job_id=row.job_id,
                target=row.target,
                rows=row.rows,
                digest=row.digest,
            )
            claims[row.location].append(claim)
    yield from ()


def _check_sink(ledger: Ledger, location: str, group: Sequence[Claim]) -> list[str]:
    try:
        return list(sinks.open_sink(location, ledger.database).check(group))
    except Exception as error:  # noqa: BLE001 - what somebody wrote into a row can be anything
        return [f"sink {location} cannot be checked: {type(error).__name__}: {error}"]


# Replaying the seals: do the rows that stand in the ledger follow from the audit?
#
# The seals are read in their order into a scratch database, and then compared with the tables, both
# by id and one row at a time, so that no table need fit into memory. Of each row must hold:
#
#     it is in a seal, and what a seal has is there
#     it was written once; or its moves follow on each other, and each is one that it may make
#     a job's fence goes up with each claim, and never down
#     its state and fence are those of its last move
#     its bytes have the digests that the seals have


_LONGEST_RUN = 1_000_000
"""Ids in one run of a seal; no transaction of ours writes more."""


class _Digests(msgspec.Struct, forbid_unknown_fields=True):
    ids: list[tuple[int, int]] = []
    columns: int = 0
    digests: str = ""


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """What one seal says of one table."""

    moves: list[tuple[int, int, str, str, int]] = []
    born: _Digests = msgspec.field(default_factory=_Digests)
    whole: _Digests = msgspec.field(default_factory=_Digests)


class _Entry(NamedTuple):
    """What one seal says of one row: a move, or a digest."""

    seq: int
    kind: str
    was: str
    now: str
    fence: int
    columns: int
    digest: bytes
    earlier: int
    """Whether it was sealed as it stood, by the migration."""


def report_damage(what: str, problems: Iterable[str]) -> Iterator[str]:
    """The problems; where the database is too damaged to be asked for more of them, that."""
    try:
        yield from problems
    except (DBAPIError, sqlite3.Error, ValueError, TypeError) as error:
        cause = getattr(error, "orig", error)
        yield f"{what} cannot be read to the end, the database is damaged: {cause}"


def seal_problems(connection: Connection) -> Iterator[str]:
    """A sentence for each row that is not what the audit has of it."""
    with contextlib.closing(sqlite3.connect("")) as scratch, exact(driver(connection)):
        scratch.execute(
            "CREATE TABLE entry (what TEXT, id INTEGER, seq INTEGER, kind TEXT, was TEXT, "
            "now TEXT, fence INTEGER, columns INTEGER, digest BLOB, earlier INTEGER)"
        )
        yield from report_damage("the seals", _read(connection, scratch))
        for covered in SEALED_TABLES:
            yield from report_damage(f"the {covered.name}", _compare(connection, scratch, covered))


def since(connection: Connection) -> str:
    """From where on the rows are sealed, where that is not the beginning; else empty."""
    query = text(
        "SELECT min(seq), max(seq), max(at) FROM cf_audit WHERE action = 'seal' AND subject = :of"
    )
    first, last, at = connection.execute(query, {"of": EARLIER}).one()
    if first is None:
        return ""
    return (
        f"rows of an earlier release were sealed as they stood on {at[:19]}Z (audit, rows {first} "
        f"to {last}): what was altered before that is not seen"
    )


def in_short(detail: str) -> str:
    """What a seal is about, for people: `3 versions, 3 jobs`; as it is where it cannot be read."""
    try:
        parts = msgspec.json.decode(detail, type=dict[str, _Part])
        held = {
            name: {row_id for row_id, _ in _entries(0, part, 0)} for name, part in parts.items()
        }
    except (msgspec.MsgspecError, ValueError):
        return detail
    return ", ".join(
        f"{len(ids)} {name if len(ids) > 1 else name[:-1]}" for name, ids in held.items()
    )


def _read(connection: Connection, scratch: sqlite3.Connection) -> Iterator[str]:
    """Take the seals apart; a sentence for each that cannot be read."""
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
        except (msgspec.MsgspecError, ValueError) as error:
            yield f"audit: row {seq} is a seal that cannot be read: {error}"
            continue
        scratch.executemany("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", entries)


def _entries(seq: int, part: _Part, earlier: int) -> Iterator[tuple[int, _Entry]]:
    for first, last, was, now, fence in part.moves:
        for row_id in _ids([(first, last)]):
            yield row_id, _Entry(seq, "move", was, now, fence, 0, b"", earlier)
    for kind, found in (("born", part.born), ("whole", part.whole)):
        ids = _ids(found.ids)
        data = base64.b64decode(found.digests, validate=True)
        if len(data) != len(ids) * DIGEST_BYTES:
            raise ValueError(f"it has {len(ids)} rows and {len(data)} bytes of digests")
        for n, row_id in enumerate(ids):
            hashed = data[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]
            yield row_id, _Entry(seq, kind, "", "", 0, found.columns, hashed, earlier)


def _ids(runs: Iterable[tuple[int, int]]) -> list[int]:
    ids: list[int] = []
    for first, last in runs:
        if not 0 <= last - first < _LONGEST_RUN:
            raise ValueError(f"it has a run from {first} to {last}")
        ids += range(first, last + 1)
    return ids


class _Table(NamedTuple):
    """A covered table as it stands."""

    covered: SealedTable
    columns: list[str]
    defaults: list[Any]


def _compare(
    connection: Connection, scratch: sqlite3.Connection, covered: SealedTable
) -> Iterator[str]:
    """Walk through what is sealed of a table and what stands in it, side by side."""
    table = _table(connection, covered)
    sealed = scratch.execute(
        "SELECT id, seq, kind, was, now, fence, columns, digest, earlier FROM entry "
        "WHERE what = ? ORDER BY id, rowid",
        (covered.name,),
    )
    stands = connection.exec_driver_sql(f"SELECT * FROM {covered.sql_name} ORDER BY id")
    both = heapq.merge(
        ((row[0], _Entry._make(row[1:])) for row in sealed),
        ((row[0], tuple(row)) for row in stands),
        key=itemgetter(0),
    )
    for row_id, group in groupby(both, key=itemgetter(0)):
        found = [item for _, item in group]
        entries = [item for item in found if isinstance(item, _Entry)]
        row = next((item for item in found if not isinstance(item, _Entry)), None)
        for words in _judge(table, entries, row):
            yield f"{covered.one} {row_id} {words}"


def _table(connection: Connection, covered: SealedTable) -> _Table:
    info = connection.exec_driver_sql(f"PRAGMA table_info({covered.sql_name})").all()
    defaults = [row[4] or "NULL" for row in info]
    values = connection.exec_driver_sql(f"SELECT {', '.join(defaults)}").one()
    return _Table(covered, [row[1] for row in info], list(values))


def _judge(table: _Table, entries: Sequence[_Entry], row: tuple[Any, ...] | None) -> Iterator[str]:
    """What is wrong with one row, given all that the seals say of it, in their order."""
    if not entries:
        yield "was added by other hands: it is in no seal"
        return
    moves = [entry for entry in entries if entry.kind == "move"]
    born = [entry for entry in entries if entry.kind == "born"]
    whole = [entry for entry in entries if entry.kind == "whole"]
    if not table.covered.state:
        state: str | None = None
        if len(born) > 1:
            yield f"was sealed twice, in rows {born[0].seq} and {born[1].seq} of the audit"
    else:
        yield from _unfit(table.covered, moves)
        state = moves[-1].now if moves else ""
    if row is None:
        if state != "":
            yield f"is missing, and row {entries[-1].seq} of the audit has it"
        return
    if state == "":
        yield "was added by other hands: by the audit it was deleted"
        return
    stands = dict(zip(table.columns, row, strict=True))
    if state is not None:
        yield from _moved_by_others(table.covered, moves[-1], stands)
    fixed = [stands[name] for name in table.covered.fixed] or list(row)
    if not born or not _is(born[-1], fixed, table.defaults):
        yield "was altered"
    elif state in table.covered.whole:
        if not whole or whole[-1].seq != moves[-1].seq:
            yield f"was not sealed when it became {state}"
        elif not _is(whole[-1], list(row), table.defaults):
            yield f"was altered since it became {state}"


def _unfit(covered: SealedTable, moves: Sequence[_Entry]) -> Iterator[str]:
    """Where a row's moves do not follow on each other, or are none that it may make."""
    state, fence = "", 0
    for move in moves:
        place = f"row {move.seq} of the audit"
        if move.was != state:
            yield f"leaves {move.was or 'nothing'} in {place}, and was {state or 'not there'}"
        elif not move.earlier and move.now not in covered.arrows.get(move.was, ()):
            arrow = f"from {move.was or 'nothing'} to {move.now or 'nothing'}"
            yield f"went {arrow} in {place}, and there is no such move"
        claimed = covered.fence != "0" and move.now == "RUNNING"
        if move.was and move.fence < fence + claimed:
            yield f"became {move.now} under fence {move.fence} in {place}, after fence {fence}"
        state, fence = move.now, move.fence


def _moved_by_others(covered: SealedTable, last: _Entry, stands: dict[str, Any]) -> Iterator[str]:
    if stands[covered.state] != last.now:
        yield (
            f"is {stands[covered.state]!s}, and row {last.seq} of the audit has it {last.now}: it "
            "was moved by other hands"
        )
    elif covered.fence in stands and stands[covered.fence] != last.fence:
        yield f"has fence {stands[covered.fence]!s}, and row {last.seq} of the audit {last.fence}"


def _is(entry: _Entry, values: list[Any], defaults: Sequence[Any]) -> bool:
    """Whether values have the digest of a seal; columns that came later have their defaults."""
    later = slice(entry.columns, len(values))
    same = digest(values[: entry.columns]) == entry.digest
    return same and values[later] == list(defaults[later])


# What must hold in the ledger whatever happened: each check gives a sentence for each break.


_INVARIANTS = {
    "location {0} ({1}): its versions are not numbered 1, 2, 3, ...": """
        SELECT l.id, l.rel_path FROM cf_file_version v JOIN cf_file_location l
        ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE NOT EXISTS (SELECT 1 FROM cf_found_output f
                          WHERE f.source = r.name AND f.path = l.path)
        GROUP BY l.id HAVING min(v.ordinal) <> 1 OR max(v.ordinal) <> count(*)
        """,
    "location {0} ({1}): its current version is not its last one": """
        SELECT l.id, l.rel_path FROM cf_file_location l
        WHERE l.current_version_id IS NOT (
            SELECT v.id FROM cf_file_version v WHERE v.location_id = l.id
            ORDER BY v.ordinal DESC LIMIT 1)
        """,
    "job {0} is COMPLETED, and its output {1} is {2}": """
        SELECT j.id, o.topic, o.state FROM cf_processing_queue j
        JOIN cf_output o ON o.job_id = j.id
        WHERE j.status = 'COMPLETED' AND o.state <> 'PUBLISHED'
        """,
    "job {0} is {1}, and no attempt of it staged its output": """
        SELECT j.id, j.status FROM cf_processing_queue j
        WHERE j.status IN ('COMPLETED', 'COMMITTING') AND NOT EXISTS (
            SELECT 1 FROM cf_attempt a
            WHERE a.job_id = j.id AND a.fence = j.fence AND a.outcome = 'STAGED')
        """,
    "job {0} has an attempt {1}, which it never claimed": """
        SELECT j.id, a.fence FROM cf_processing_queue j JOIN cf_attempt a ON a.job_id = j.id
        WHERE a.fence > j.fence
        """,
    "job {0} is {1} without a reason": """
        SELECT id, status FROM cf_processing_queue
        WHERE status IN ('FAILED', 'SUPERSEDED') AND reason = ''
        """,
    "job {0} is FAILED, and neither an attempt nor the audit says so": """
        SELECT j.id FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
        AND NOT EXISTS (SELECT 1 FROM cf_attempt a WHERE a.job_id = j.id AND a.fence = j.fence)
        AND 'job ' || j.id NOT IN (SELECT subject FROM cf_audit WHERE action IN ('fail', 'refuse'))
        """,
    "job {0} is COMPLETED, and the audit has no commit of it": """
        SELECT substr(subject, 5) FROM (
            SELECT 'job ' || id AS subject FROM cf_processing_queue WHERE status = 'COMPLETED'
            EXCEPT SELECT subject FROM cf_audit WHERE action = 'commit')
        """,
    "row {1} of {0} points to a row of {2} that is not there": "PRAGMA foreign_key_check",
}


def broken_invariants(connection: Connection) -> Iterator[str]:
    """Every invariant that does not hold."""
    for words, query in _INVARIANTS.items():
        yield from report_damage("the ledger", _broken(connection, words, query))
    for (found,) in connection.execute(text("PRAGMA integrity_check")):
        if found != "ok":
            yield f"the database is damaged: {found}"


def _broken(connection: Connection, words: str, query: str) -> Iterator[str]:
    for row in connection.execute(text(query)):
        yield words.format(*row)


def damage(connection: Connection) -> str:
    """What is wrong with the database's pages, looked at in order and not in depth; else empty."""
    found: str = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    return "" if found == "ok" else found


def running_jobs(connection: Connection) -> Iterator[str]:
    """Jobs that are RUNNING; to be asked when nobody can be running them."""
    query = text("SELECT id FROM cf_processing_queue WHERE status = 'RUNNING'")
    for job_id in connection.execute(query).scalars():
        yield f"job {job_id} is RUNNING, and no daemon runs (casparian start puts it right)"


def sizes(connection: Connection) -> dict[str, int]:
    """How much there is to check."""
    tables = {
        "locations": "SELECT count(*) FROM cf_file_location",
        "versions": "SELECT count(*) FROM cf_file_version",
        "jobs": "SELECT count(*) FROM cf_processing_queue",
        "attempts": "SELECT count(*) FROM cf_attempt",
        "audit rows": "SELECT count(*) FROM cf_audit",
        "snapshots": "SELECT count(*) FROM cf_snapshot",
    }
    return {name: connection.execute(text(query)).scalar_one() for name, query in tables.items()}
