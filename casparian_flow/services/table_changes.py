"""Tables that are there: their contracts, and what a change of one would move."""

from __future__ import annotations

import contextlib
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from casparian_flow import bundled, contract
from casparian_flow.contract import Column, Contract
from casparian_flow.db import backfill, plugins, rebuild, tables
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.backfill import Backfill, Choice
from casparian_flow.db.rebuild import Progress, Started
from casparian_flow.errors import CasparianError, NotFound
from casparian_flow.sdk import printable
from casparian_flow.services import outputs, trial
from casparian_flow.services.table_contracts import Said, keep_missing, read
from casparian_flow.services.tables import Outcome, Workshop, matching
from casparian_flow.services.trial import Subject

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 5
"""Records that are named, of those that move."""

_SCRIPT = re.compile(rb"(?ms)^# /// script$.*?^# ///$")


class Table(NamedTuple):
    """A published table."""

    contract: Contract
    subject: Subject
    """What runs."""


def find(ledger: Ledger, name: str) -> Table:
    """The table of a name, in its active version.

    Raises:
        NotFound: there is none.
        CasparianError: it is a plugin and no table.
        ArtifactRefused: it may not run.
    """
    literal = contract_of(ledger, name)
    return Table(read(literal), trial.published(ledger, name))


def contract_of(ledger: Ledger, name: str, version: str | None = None) -> dict[str, Any]:
    """The literal of a table's contract.

    Raises:
        NotFound: there is none.
        CasparianError: it is a plugin and no table.
    """
    if not ledger.read(lambda c: plugins.versions(c, name)):
        raise NotFound(f"there is no table {name!r}", "casparian table list")
    literal = ledger.read(lambda c: tables.contract_of(c, name, version))
    if not literal:
        raise CasparianError(f"{name} is a plugin and no table", f"casparian plugins show {name}")
    return literal


def lock_of(table: Table) -> str:
    """The lock of a table's next version: the present one, while the reader asks for the same.

    A change of the contract alone then runs with the same packages.
    """
    own = _SCRIPT.search(table.subject.artifact.source)
    reader = _SCRIPT.search(bundled.path(table.contract.reader).read_bytes())
    same = own and reader and own[0] == reader[0]
    return table.subject.artifact.lock if same else ""


# Changes.


class Change(NamedTuple):
    """A new contract for a table, and what it would make of the present files."""

    old: Contract
    new: Contract
    before: Outcome
    after: Outcome
    shown: Sequence[str]
    """Records that move, a line each."""
    to_table: int
    """Records that are rejects now and rows then."""
    to_rejects: int

    @property
    def words(self) -> list[str]:
        """What differs between the contracts."""
        return differences(self.old, self.new)

    @property
    def retyped(self) -> bool:
        """Whether a column gets another type."""
        types = {column.name: column.type for column in self.old.columns}
        return any(types.get(each.name, each.type) != each.type for each in self.new.columns)


def differences(old: Contract, new: Contract) -> list[str]:
    """What differs between two contracts, a line each."""
    lines = []
    one, other = contract.literal(old), contract.literal(new)
    before, after = ({each["name"]: each for each in made.pop("columns")} for made in (one, other))
    for name in dict.fromkeys([*before, *after]):
        was, now = _column(before.get(name)), _column(after.get(name))
        if was != now:
            lines.append(f"column {name}: {was or 'none'} -> {now or 'none'}")
    for word in dict.fromkeys([*one, *other]):
        if one.get(word) != other.get(word):
            lines.append(f"{word}: {one.get(word, 'none')} -> {other.get(word, 'none')}")
    return lines


def _column(literal: dict[str, Any] | None) -> str:
    if not literal:
        return ""
    words = (f"{key}={value!r}" for key, value in literal.items() if key not in ("name", "type"))
    return " ".join([literal["type"], *words])


def try_change(
    workshop: Workshop, table: Table, new: Contract, rows: Sequence[Any]
) -> tuple[Change, Subject]:
    """What a new contract would move, over these versions; and the plugin that would do it."""
    subject = workshop.subject_of(new)
    before = workshop.try_out(table.subject, rows, records=True)
    after = workshop.try_out(subject, rows, records=True)
    to_table = to_rejects = 0
    shown: list[str] = []
    for one, other in zip(before.files, after.files, strict=True):
        if one.error or one.held or other.error or other.held:
            continue
        assert one.output.records is not None and other.output.records is not None
        gained = _lacking(one.output.records, other.output.records)
        lost = _lacking(other.output.records, one.output.records)
        to_table += len(gained)
        to_rejects += len(lost)
        for records, where in ((gained, "to the table"), (lost, "to the rejects")):
            for record in sorted(records[: EXAMPLES - len(shown)].to_pylist()):
                shown.append(f"{one.file} record {record:,} {where}")
    return Change(table.contract, new, before, after, shown, to_table, to_rejects), subject


def _lacking(one: array[int], other: array[int]) -> pa.Array:
    """The numbers of the first that the second does not have, each once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    here, there = (
        pa.Array.from_buffers(pa.int64(), len(each), [None, pa.py_buffer(each)])
        for each in (one, other)
    )
    return pc.unique(here.filter(pc.invert(pc.is_in(here, value_set=there))))


class Redone(NamedTuple):
    """What was queued so that a table is made anew."""

    cancelled: list[Progress]
    """A rebuild with the contract before, which was open."""
    rebuilt: list[Started]
    """Everything that shows: the old rows show until all of it has ended well."""
    rest: Backfill
    """What had no rows."""
    notes: list[str]
    """Which sinks could not be told that a rebuild was cancelled, a sentence each."""


def redo(ledger: Ledger, name: str) -> Redone:
    """Work everything of a table again with its active version.

    A rebuild, for the types of columns may be others; versions that gave no rows are queued as in
    a backfill. An open rebuild with an earlier contract is cancelled.
    """
    cancelled, rebuilt, notes = _restart(ledger, name)
    if not cancelled:
        with contextlib.suppress(NotFound):  # nothing of it shows
            rebuilt = rebuild.start(ledger, name)
    rest = backfill.backfill(ledger, Choice(name, redo=True, retry=True))
    return Redone(cancelled, rebuilt, rest, notes)


def _restart(ledger: Ledger, name: str) -> tuple[list[Progress], list[Started], list[str]]:
    """`rebuild.restart`: what was cancelled, what was begun, and which sinks could not be told."""
    restarted = rebuild.restart(ledger, name)
    rebuilt = [each.started for each in restarted if each.started]
    notes = outputs.tell(ledger) if restarted else []
    return [each.cancelled for each in restarted], rebuilt, notes


def check_redo(ledger: Ledger, name: str) -> None:
    """Return if no rebuild with the active contract is open.

    Raises:
        CasparianError: one is, and how it can be ended.
    """

    def work(connection: Connection) -> None:
        if not rebuild.outdated(connection, name):
            rebuild.check_none_open(connection, name)

    ledger.read(work)


# Held versions.


def held(ledger: Ledger, name: str, which: str | None) -> list[Any]:
    """The held versions of a table.

    Args:
        which: only this one: its version id, or the path of its file.

    Raises:
        NotFound: there is none.
    """
    rows = list(ledger.read(lambda c: tables.held(c, name)))
    if not rows:
        raise NotFound(f"no version of a file is held by table {name}", "casparian jobs --held")
    if which is None:
        return rows
    chosen = [row for row in rows if which in _names(row)]
    if not chosen:
        known = ", ".join(f"{row.version_id} ({row.source}/{row.rel_path})" for row in rows[:8])
        raise NotFound(f"{which} is not held by table {name}", f"one of {known}")
    return chosen


def _names(row: Any) -> set[str]:
    path = os.path.join(row.root_path, os.fsdecode(row.path))
    return {
        str(row.version_id), row.rel_path, f"{row.source}/{row.rel_path}", path,
        os.path.relpath(path),
    }  # fmt: skip


def accepted(workshop: Workshop, table: Table, rows: Sequence[Any]) -> Contract:
    """The contract with which held versions would be taken: their new columns are added, and
    columns that they lack may be missing in any file.

    Raises:
        CasparianError: no contract takes both these and the earlier files.
    """
    old = table.contract
    found = workshop.survey(old.table, rows, _as_contracted(old))
    present = set.intersection(*(set(each["names"]) for each in found.facts))
    _check_accepted(old, present, list(found.words))
    literal = contract.literal(old)
    for column in literal["columns"]:
        if column["name"] not in present and column.get("from") != "path":
            column.pop("required", None)
            keep_missing(column, old, required=False)
            column["optional"] = True
    known = {column.name for column in old.columns}
    literal["columns"] += [
        {**each, "optional": True} for name, each in found.words.items() if name not in known
    ]
    return read(literal)


def _check_accepted(old: Contract, present: set[str], names: Sequence[str]) -> None:
    """
    Args:
        present: the columns that all held files have.
        names: the columns that any of them has.

    Raises:
        CasparianError: a held file lacks a column of the key, or has another case in a name.
    """
    of_file = [column.name for column in old.columns if not column.from_path]
    words = [
        f"column {printable(name)} is missing, and it is in the key"
        for name in old.key
        if name in of_file and name not in present
    ]
    known: dict[str, str] = {}
    for name in dict.fromkeys([*(column.name for column in old.columns), *names]):
        other = known.setdefault(name.casefold(), name)
        if other != name:
            words.append(f"column {printable(name)} differs from {printable(other)} in case only")
    if words:
        raise CasparianError(
            f"table {old.table} cannot accept the columns of the held files: {'; '.join(words)}",
            f"mend the files; or casparian table show {old.table} --toml > FILE, change it, and "
            f"casparian table set {old.table} --from FILE",
        )


def _as_contracted(given: Contract) -> Said:
    return Said(dialect={word: str(value) for word, value in given.dialect.items()})


def accept(ledger: Ledger, name: str, rows: Sequence[Any]) -> Redone:
    """Queue held versions for the active version of their table.

    An open rebuild with an earlier contract is begun again, for it waits for what that has held.

    Raises:
        CasparianError: nothing could be queued.
    """
    versions = tuple(row.version_id for row in rows)
    cancelled, rebuilt, notes = _restart(ledger, name)
    rest = backfill.backfill(ledger, Choice(name, redo=True, retry=True, versions=versions))
    if not rebuilt and not rest.queued:
        raise CasparianError(
            f"no held version could be queued for {name} {rest.version}: the content of "
            f"{rest.bytes_gone:,} is gone, {rest.retracted:,} are retracted, {rest.waits:,} wait",
            "casparian jobs --held   (casparian jobs dismiss ID ends the wait for one)",
        )
    return Redone(cancelled, rebuilt, rest, notes)


# What the files say now.


class Difference(NamedTuple):
    """A contract against its present files."""

    columns: list[dict[str, str]]
    """Column, its type, the type that the files speak for, and why."""
    outcome: Outcome

    @property
    def differs(self) -> bool:
        """Whether a person should look at it."""
        other = any(row["contract"] != row["files"] for row in self.columns)
        return other or bool(self.outcome.not_taken)


def diff(workshop: Workshop, ledger: Ledger, table: Table) -> Difference:
    """Compare a table's contract with what its present files say.

    Raises:
        NotFound: it has none.
    """
    given = table.contract
    rows = matching(ledger, given.files, given.source)
    found = workshop.survey(given.table, rows, _as_contracted(given))
    columns = [
        {
            "column": name,
            "contract": _described(_words(given.column(name))),
            "files": _described(found.words.get(name)),
            "why": found.why.get(name, ""),
        }
        for name in dict.fromkeys([*(column.name for column in given.columns), *found.words])
        if not _is_of_path(given.column(name))
    ]
    return Difference(columns, workshop.try_out(table.subject, rows))


def _words(column: Column | None) -> dict[str, Any] | None:
    return contract.words_of(column) if column else None


def _is_of_path(column: Column | None) -> bool:
    return column is not None and column.from_path


def _described(words: Mapping[str, Any] | None) -> str:
    return " ".join(filter(None, [words["type"], words.get("format", "")])) if words else ""
