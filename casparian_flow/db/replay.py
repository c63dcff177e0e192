"""Replaying the seals: do the rows that stand in the ledger follow from the audit?

The seals are read in their order into a scratch database, and then compared with the tables, both
by id and one row at a time, so that no table need fit into memory. Of each row must hold:

    it is in a seal, and what a seal has is there
    it was written once; or its moves follow on each other, and each is one that it may make
    a job's fence goes up with each claim, and never down
    its state and fence are those of its last move
    its bytes have the digests that the seals have
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
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from casparian_flow.db.access import driver
from casparian_flow.db.seals import COVERED, DIGEST_BYTES, EARLIER, Covered, digest, exact

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


def told(what: str, problems: Iterable[str]) -> Iterator[str]:
    """The problems; where the database is too damaged to be asked for more of them, that."""
    try:
        yield from problems
    except (DBAPIError, sqlite3.Error, ValueError, TypeError) as error:
        cause = getattr(error, "orig", error)
        yield f"{what} cannot be read to the end, the database is damaged: {cause}"


def problems(connection: Connection) -> Iterator[str]:
    """A sentence for each row that is not what the audit has of it."""
    with contextlib.closing(sqlite3.connect("")) as scratch, exact(driver(connection)):
        scratch.execute(
            "CREATE TABLE entry (what TEXT, id INTEGER, seq INTEGER, kind TEXT, was TEXT, "
            "now TEXT, fence INTEGER, columns INTEGER, digest BLOB, earlier INTEGER)"
        )
        yield from told("the seals", _read(connection, scratch))
        for covered in COVERED:
            yield from told(f"the {covered.name}", _compare(connection, scratch, covered))


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

    covered: Covered
    columns: list[str]
    defaults: list[Any]


def _compare(
    connection: Connection, scratch: sqlite3.Connection, covered: Covered
) -> Iterator[str]:
    """Walk through what is sealed of a table and what stands in it, side by side."""
    table = _table(connection, covered)
    sealed = scratch.execute(
        "SELECT id, seq, kind, was, now, fence, columns, digest, earlier FROM entry "
        "WHERE what = ? ORDER BY id, rowid",
        (covered.name,),
    )
    stands = connection.exec_driver_sql(f"SELECT * FROM {covered.table} ORDER BY id")
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


def _table(connection: Connection, covered: Covered) -> _Table:
    info = connection.exec_driver_sql(f"PRAGMA table_info({covered.table})").all()
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


def _unfit(covered: Covered, moves: Sequence[_Entry]) -> Iterator[str]:
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


def _moved_by_others(covered: Covered, last: _Entry, stands: dict[str, Any]) -> Iterator[str]:
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
