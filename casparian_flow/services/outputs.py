"""What a person changes about published outputs: forget, restore, retract and reinstate.

`forget` and `restore` are for an output that was deleted or altered in its sink. Neither touches
one that the sink holds whole. Each verb changes the ledger in one transaction, which decides anew
what stands. Then the sinks are told; what a sink cannot be told now, the daemon tells it later.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import debts, jobs, moves, rebuild, visibility
from casparian_flow.db import outputs as db_outputs
from casparian_flow.db.access import Connection, Ledger, Row
from casparian_flow.db.audit import Event
from casparian_flow.db.outputs import NAMED
from casparian_flow.db.routing import resolve_argument
from casparian_flow.db.states import JobStatus
from casparian_flow.engine import sinks, telling
from casparian_flow.engine.sinks import PREFIXES, parquet_record
from casparian_flow.errors import CasparianError, NotFound, SinkUnavailable, counted
from casparian_flow.protocol import Output
from casparian_flow.services import store_upkeep


def tell(ledger: Ledger) -> list[str]:
    """Tell the sinks what readers are to see by now; a sentence for each that cannot be told.

    The daemon tries those again.

    Raises:
        LedgerError: the ledger could not be read or written.
    """
    with telling.lock(ledger.database):
        done = telling.tell(ledger)
    return list(dict.fromkeys(f"{LATER}: {error.message}" for error in done.faults))


def tell_without_daemon(ledger: Ledger) -> list[str]:
    """`tell`, unless a daemon runs: that tells the sinks when it is woken."""
    if durable.daemon_lock_holder(ledger.database.daemon_lock) is not None:
        return []
    return tell(ledger)


LATER = "readers do not see the change yet"


def cancel_rebuild(ledger: Ledger, name: str) -> tuple[list[rebuild.Progress], list[str]]:
    """Cancel the open rebuilds of a plugin or a topic.

    Returns:
        What they had done, and which sinks could not be told, a sentence each.

    Raises:
        NotFound: none is open.
    """
    return rebuild.cancel(ledger, name), tell(ledger)


def forget(ledger: Ledger, name: str) -> list[str]:
    """Stop tracking outputs that were deleted or altered in their sink; their targets.

    `verify` passes then, and queries leave them out. The sink hides what it still has of them.

    Args:
        name: a job's id, or an output's target as `casparian outputs list` shows it, or as a path
            from the current directory.

    Raises:
        NotFound: no published output has that name.
        CasparianError: the sink holds it whole, or it is forgotten already.
    """
    broken = _broken(ledger, _named(ledger, name), name)
    lost = [row for row in broken if row.state != FORGOTTEN]
    if not lost:
        raise CasparianError(
            f"{name} is already forgotten; nothing was changed",
            f"casparian outputs restore {broken[0].job_id}",
        )

    def work(connection: Connection) -> None:
        db_outputs.forget(connection, [row.output_key for row in lost])
        versions = [row.version_id for row in lost]
        visibility.refresh(connection, visibility.of_versions(connection, versions))

    def events(_: None) -> list[Event]:
        return [
            Event("forget", f"output {row.target}", {"job": row.job_id, "rows": row.rows})
            for row in lost
        ]

    ledger.change(work, events)
    crashpoint("outputs.forgotten")
    tell(ledger)
    return [row.target for row in lost]


FORGOTTEN = "FORGOTTEN"
STANDING = ("CURRENT", "PAST")
RETRACTED = "RETRACTED"
HIDDEN = "HIDDEN"


def restore(ledger: Ledger, name: str) -> list[int]:
    """Make outputs that were deleted or altered again from their versions; the jobs queued.

        withdraw    each sink deletes what is left of its outputs; asking twice is asking once
        queue       the ledger queues the jobs and owes their outputs, with the audit rows

    In this order, since a sink that is asked later could delete what the job has published anew.
    After a crash in between, or an error of the second step, the outputs are missing in their
    sinks: `verify` names them, and the same call restores them.

    Args:
        name: as for `forget`; what was forgotten may be restored.

    Raises:
        NotFound: no published output has that name.
        CasparianError: the sink holds it whole, its job is at work, or the version's bytes are
            neither in the store nor in its file any more; nothing was changed. Or another
            command has moved its job meanwhile; nothing was queued.
        SinkConflict: an altered file stands in its place.
    """
    broken = _broken(ledger, _named(ledger, name), name)
    for row in broken:
        _check_bytes(row, ledger)

    def work(connection: Connection) -> list[int]:
        queued = db_outputs.restore(connection, [row.id for row in broken])
        for job_id in sorted({row.job_id for row in broken}.difference(queued)):
            raise CasparianError(
                f"job {job_id} is {jobs.status(connection, job_id)} by now; nothing was queued",
                f"casparian jobs show {job_id}",
            )
        return queued

    def events(_: list[int]) -> list[Event]:
        return [Event("restore", f"output {row.target}", {"job": row.job_id}) for row in broken]

    with telling.lock(ledger.database):
        for location, group in _by_location(ledger, [row.id for row in broken]).items():
            sinks.open_sink(location, ledger.database).delete(group)
        crashpoint("outputs.withdrawn")
        queued = ledger.change(work, events)
        crashpoint("outputs.queued")
        telling.tell(ledger)
    return queued


def with_places(rows: Sequence[Row]) -> None:
    """Set the `target` of outputs in Parquet sinks to where their file is now: it moves when what
    readers see changes. A sink that cannot be read leaves it as it was at the publication.

    Args:
        rows: with `sink`, `topic`, `output_key` and `target`.
    """
    topics: dict[tuple[Path, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["target"] and row["sink"].startswith(PREFIXES["parquet"]):
            root = Path(row["sink"].removeprefix(PREFIXES["parquet"]))
            topics[root, row["topic"]].append(row)
    for (root, topic), group in topics.items():
        with (
            contextlib.suppress(SinkUnavailable),
            parquet_record.opened(root, write=False) as record,
        ):
            places = record.places(topic) if record else {}
            for row in group:
                if row["output_key"] in places:
                    row["target"] = str(root / places[row["output_key"]][0])


def _key_at(ledger: Ledger, path: str) -> str:
    """The key of the output whose file is there now; empty if there is none."""
    for location in ledger.read(db_outputs.locations):
        root = location.removeprefix(PREFIXES["parquet"])
        if root != location and path.startswith(f"{root}/"):
            with parquet_record.opened(Path(root), write=False) as record:
                if record and (key := record.key_at(path.removeprefix(f"{root}/"))):
                    return key
    return ""


def _by_location(ledger: Ledger, output_ids: Collection[int]) -> dict[str, list[Output]]:
    groups = defaultdict(list)
    for output in ledger.read(lambda c: debts.records(c, output_ids)).values():
        groups[output.location].append(output)
    return groups


def _named(ledger: Ledger, name: str) -> list[Any]:
    """The published outputs that a person names.

    Raises:
        NotFound: there are none.
        CasparianError: they are retracted or replaced.
    """
    path = os.path.abspath(name)
    if key := _key_at(ledger, path):
        rows = _select(ledger, "output_key = :key", key=key)
    else:
        which = "target = :name OR CAST(job_id AS TEXT) = :name"
        rows = _select(ledger, which, name=name) or _select(ledger, which, name=path)
    if not rows:
        raise NotFound(f"no published output is named {name}", "casparian outputs list")
    due = [row for row in rows if row.state in (*STANDING, FORGOTTEN)]
    retracted = [row for row in rows if row.state == RETRACTED]
    if not due and retracted:
        raise CasparianError(
            f"output {name} is retracted; nothing was changed",
            f"casparian retract --undo {retracted[0].version_id}",
        )
    if not due:
        raise CasparianError(
            f"output {name} was replaced by a later output of the same file; nothing was changed",
            "casparian outputs list",
        )
    return due


def _broken(ledger: Ledger, rows: Sequence[Any], name: str) -> list[Any]:
    """The outputs that their sinks do not hold whole.

    Raises:
        CasparianError: there are none.
    """
    found = ledger.read(lambda c: debts.records(c, [row.id for row in rows]))

    def is_whole(row: Any) -> bool:
        return not sinks.open_sink(row.location, ledger.database).check([found[row.id]])

    broken = [row for row in rows if row.state == FORGOTTEN or not is_whole(row)]
    if not broken:
        unchanged = f"the outputs of job {name}" if name.isdigit() else name
        raise CasparianError(
            f"nothing to restore or forget: the sink has {unchanged} unchanged",
            "delete it in its sink first; or casparian retract PATH   (hides a file's rows)",
        )
    return broken


def _check_bytes(row: Any, ledger: Ledger) -> None:
    """Return if the bytes of the output's version are still there: in the store or its file.

    Raises:
        CasparianError: why not.
    """
    if row.status != JobStatus.COMPLETED:
        raise CasparianError(
            f"job {row.job_id} is {row.status or 'of an earlier ledger'}; only outputs of "
            "completed jobs can be restored",
            f"casparian jobs show {row.job_id}",
        )
    if row.kept and store_upkeep.has_whole(ledger, row.content_hash):
        return
    found = _digest(os.path.join(os.fsencode(row.root_path), row.path))
    if found != row.content_hash:
        raise CasparianError(
            f"{row.rel_path} {'has changed' if found else 'was deleted'} since version "
            f"{row.ordinal}, and the store does not have the content that job "
            f"{row.job_id} read; nothing was changed",
            f"restore the file, or: casparian outputs forget {row.job_id}",
        )


def _digest(path: bytes | Path) -> str:
    """SHA-256 of a file, hexadecimal; empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


# `casparian retract`: hide a file's rows in every sink, and show them again.


_LACK = {
    False: "{} has no visible rows: they were retracted, replaced or forgotten",
    True: "{} has no retracted rows",
}


def retract(ledger: Ledger, name: str, *, undo: bool = False) -> list[Any]:
    """Hide the rows of a location's versions, or of one version; the outputs that it concerned.

    A retraction belongs to a version: of all plugins and topics, also of what is published later.
    It goes with the version's file when that moves.

    Args:
        name: a version's id, or a location: a path from here, or `source/rel_path`.
        undo: show again what was hidden.

    Raises:
        NotFound: no such location or version, or nothing of it is to be seen (`undo`: retracted).
        CasparianError: files of several source roots may be meant; nothing was changed.
        SinkConflict, SinkUnavailable: a sink could not be told; it is decided, and told by the
            next call, or by the daemon.
    """
    named = _of_file(ledger, name)
    chosen = _chosen(named, undo=undo)
    if not chosen:
        return _told_again(ledger, name, named, undo=undo)
    named_versions = sorted({row.version_id for row in chosen})

    def work(connection: Connection) -> None:
        versions = moves.same_file(visibility.query_of(connection), named_versions)
        db_outputs.retract(connection, versions, undo=undo)
        visibility.refresh(connection, visibility.of_versions(connection, versions))

    def events(_: None) -> list[Event]:
        action = "reinstate" if undo else "retract"
        return [Event(action, f"output {row.target}", _detail(row)) for row in chosen]

    ledger.change(work, events)
    crashpoint("retract.decided")
    _tell_of(ledger, chosen, "reinstated" if undo else "retracted")
    return chosen


def _chosen(named: Sequence[Any], *, undo: bool) -> list[Any]:
    """The outputs to be retracted or reinstated. Where nothing shows, as of a file that was deleted
    or moved and whose rows went with it, those that would show when it comes back."""
    retracted = [row for row in named if row.state == RETRACTED]
    if undo:
        return retracted
    shown = [row for row in named if row.state in STANDING]
    done = {row.version_id for row in (*retracted, *shown)}
    hidden = [row for row in named if row.state == HIDDEN and row.version_id not in done]
    return shown + [row for row in hidden if row.has_moved or not shown]


def _detail(row: Any) -> dict[str, Any]:
    return {
        "job": row.job_id, "version": row.version_id, "rows": row.rows, "key": row.output_key,
    }  # fmt: skip


def _told_again(ledger: Ledger, name: str, named: Sequence[Any], *, undo: bool) -> list[Any]:
    """Tell the sinks what was decided before, and could not be told.

    Raises:
        NotFound: they know.
        SinkConflict, SinkUnavailable: a sink still cannot be told.
    """
    owed = {debt.output_id for group in ledger.read(debts.owed).values() for debt in group}
    decided = STANDING if undo else (RETRACTED,)
    again = [row for row in named if row.id in owed and row.state in decided]
    if not again:
        raise NotFound(_LACK[undo].format(name), "casparian outputs list")
    _tell_of(ledger, again, "reinstated" if undo else "retracted")
    return again


def _tell_of(ledger: Ledger, rows: Sequence[Any], deed: str) -> None:
    """Tell the sinks their debts.

    Args:
        deed: what became of these outputs in the ledger.

    Raises:
        SinkConflict, SinkUnavailable: one of them could not be told.
    """
    with telling.lock(ledger.database):
        done = telling.tell(ledger)
    for row in rows:
        error = done.away.get(sinks.store(row.location)) or done.conflicts.get(row.id)
        if error:
            some = f"{counted(len(rows), 'output')} {'is' if len(rows) == 1 else 'are'} {deed}"
            words = f"{some} in the ledger, but {LATER}: {error.message}"
            raise type(error)(words, error.hint) from error


def _of_file(ledger: Ledger, name: str) -> list[Any]:
    """Every output of the version or the location that a person names.

    Raises:
        NotFound: there is none.
        CasparianError: files of several source roots may be meant.
    """
    if name.isdecimal():
        rows = _select(ledger, "version_id = :id", id=int(name))
    else:
        which = "source = :source AND (path = :path OR rel_path = :rel_path)"
        rows = [
            row
            for root, path, shown in ledger.read(lambda c: list(resolve_argument(c, name)))
            for row in _select(ledger, which, source=root.name, path=path, rel_path=shown)
        ]
    if not rows:
        raise NotFound(
            f"{name} has no published outputs", "casparian outputs list   (casparian versions PATH)"
        )
    files = sorted({(row.source, row.rel_path) for row in rows})
    if len(files) > 1:
        named = " or ".join(f"{path} of source root {source}" for source, path in files)
        raise CasparianError(
            f"{name} may be {named}; nothing was changed", "give the absolute path of the file"
        )
    return rows


def _select(ledger: Ledger, which: str, **values: Any) -> list[Any]:
    """The published outputs for which a condition over the columns of `NAMED` holds."""
    query = f"SELECT * FROM ({NAMED}) WHERE {which} ORDER BY job_id, output_key"  # noqa: S608
    return ledger.read(lambda c: list(c.execute(query, values)))
