"""What a person changes about published outputs: forget, restore, retract and reinstate.

`forget` and `restore` are for an output that was deleted or altered in its sink. Neither touches
one that the sink holds whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, text, update

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.models import (
    ForgottenOutput,
    JobStatus,
    Output,
    OutputState,
    RetractedOutput,
    Retraction,
)
from casparian_flow.db.outputs import NAMED
from casparian_flow.db.routing import resolve_argument
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.errors import CasparianError, NotFound
from casparian_flow.services import store_upkeep

log = logging.getLogger(__name__)


def forget(ledger: Ledger, name: str) -> list[str]:
    """Stop tracking outputs that were deleted or altered in their sink; their targets.

    `verify` passes then, and queries leave them out. What the sink still has of them stays.

    Args:
        name: a job's id, or an output's target as `casparian outputs list` shows it, or as a path
            from the current directory.

    Raises:
        NotFound: no published output has that name.
        CasparianError: the sink holds it whole, or it is forgotten already.
    """
    broken = _broken(ledger, _named(ledger, name), name)
    lost = [row for row in broken if not row.forgotten]
    if not lost:
        raise CasparianError(
            f"{name} is already forgotten; nothing was changed",
            f"casparian outputs restore {broken[0].job_id}",
        )

    def work(connection: Connection) -> None:
        rows = [{"output_key": row.output_key} for row in lost]
        connection.execute(insert(ForgottenOutput), rows)

    def events(_: None) -> list[Event]:
        return [
            Event("forget", f"output {row.target}", {"job": row.job_id, "rows": row.rows})
            for row in lost
        ]

    ledger.change(work, events)
    return [row.target for row in lost]


def restore(ledger: Ledger, name: str) -> list[int]:
    """Make outputs that were deleted or altered again from their versions; the jobs queued.

        withdraw    each sink removes what is left of its outputs; asking twice is asking once
        queue       the ledger queues the jobs and owes their outputs, with the audit rows

    In this order, since a sink that is asked later could remove what the job has published anew.
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
    for row in broken:
        sinks.open_sink(row.location, ledger.database).withdraw(claim(row))
    crashpoint("outputs.withdrawn")

    def work(connection: Connection) -> list[int]:
        wanted = {row.job_id for row in broken}
        queued = jobs.restore(connection, sorted(wanted))
        for job_id in sorted(wanted.difference(queued)):
            raise CasparianError(
                f"job {job_id} is {jobs.status(connection, job_id)} by now; nothing was queued",
                f"casparian jobs show {job_id}",
            )
        keys = [row.output_key for row in broken]
        forgotten = ForgottenOutput.output_key.in_(keys)
        connection.execute(delete(ForgottenOutput).where(forgotten))
        owed = update(Output).where(Output.output_key.in_(keys))
        planned = {"state": OutputState.PLANNED, "published_at": None, "target": ""}
        connection.execute(owed.values(planned))
        return queued

    def events(_: list[int]) -> list[Event]:
        return [Event("restore", f"output {row.target}", {"job": row.job_id}) for row in broken]

    return ledger.change(work, events)


def _named(ledger: Ledger, name: str) -> list[Any]:
    """The published outputs that a person names.

    Raises:
        NotFound: there are none.
        CasparianError: they are retracted or replaced.
    """
    which = "target = :name OR CAST(job_id AS TEXT) = :name"
    rows = _select(ledger, which, name=name)
    rows = rows or _select(ledger, which, name=os.path.abspath(name))
    if not rows:
        raise NotFound(f"no published output is named {name}", "casparian outputs list")
    if all(row.retracted for row in rows):
        raise CasparianError(
            f"output {name} is retracted; nothing was changed",
            f"casparian retract --undo {rows[0].version_id}",
        )
    due = [row for row in rows if not (row.retracted or row.replaced)]
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

    def is_whole(row: Any) -> bool:
        return not sinks.open_sink(row.location, ledger.database).check([claim(row)])

    broken = [row for row in rows if not is_whole(row)]
    if not broken:
        unchanged = f"the outputs of job {name}" if name.isdigit() else name
        raise CasparianError(
            f"nothing to restore or forget: the sink has {unchanged} unchanged",
            "delete it in its sink first; or casparian retract PATH   (hides a file's rows)",
        )
    return broken


def claim(row: Any) -> Claim:
    """What the ledger says of an output, from a row of `outputs.NAMED`."""
    return Claim(
        topic=row.topic, output_key=row.output_key, job_id=row.job_id, target=row.target,
        rows=row.rows, digest=row.digest,
    )  # fmt: skip


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
#
#     decide    the ledger says what is to become of each output, with its audit row
#     ask       each sink does it; asking twice is asking once
#     settle    the ledger says that it is done
#
# From the first step on no query and no `verify` expects the rows. A crash after it is rolled
# forward by the next `casparian retract`, and by the daemon when it starts.


_LACK = {
    False: "{} has no visible rows: they were retracted, replaced or forgotten",
    True: "{} has no retracted rows",
}


def retract(ledger: Ledger, name: str, *, undo: bool = False) -> list[Any]:
    """Hide the rows of a location's versions, or of one version; the outputs that it concerned.

    Args:
        name: a version's id, or a location: a path from here, or `source/rel_path`.
        undo: show again what was hidden.

    Raises:
        NotFound: no such location or version, or nothing of it is to be seen (`undo`: retracted).
        CasparianError: a job of it is at work, or what stands in a sink is not whole; nothing was
            changed.
        SinkConflict, SinkUnavailable: a sink could not do it; it is decided, and done by the next
            call, or when the daemon starts.
    """
    done = {row.output_key: row for row in roll_forward(ledger)}
    named = _of_file(ledger, name)
    ledger.read(lambda c: _check_idle(c, named))
    chosen = _chosen(named, undo=undo)
    if not chosen:
        state = Retraction.REINSTATING if undo else Retraction.RETRACTING
        again = [row for row in named if row.output_key in done]
        if again and all(done[row.output_key].state == state for row in again):
            return again  # it was decided before a crash, and has been done just now
        raise NotFound(_LACK[undo].format(name), "casparian outputs list")
    if not undo:
        _check_whole(ledger, chosen)
    keys = [row.output_key for row in chosen]

    def work(connection: Connection) -> None:
        _check_idle(connection, named)
        if undo:
            these = update(RetractedOutput).where(RetractedOutput.output_key.in_(keys))
            connection.execute(these.values(state=Retraction.REINSTATING))
        else:
            rows = [{"output_key": key, "state": Retraction.RETRACTING} for key in keys]
            connection.execute(insert(RetractedOutput), rows)

    def events(_: None) -> list[Event]:
        action = "reinstate" if undo else "retract"
        return [Event(action, f"output {row.target}", _detail(row)) for row in chosen]

    ledger.change(work, events)
    crashpoint("retract.decided")
    for row in _pending(ledger):
        if row.output_key in keys:
            _carry_out(ledger, row)
    return chosen


def _detail(row: Any) -> dict[str, Any]:
    return {
        "job": row.job_id, "version": row.version_id, "rows": row.rows, "key": row.output_key,
    }  # fmt: skip


def roll_forward(ledger: Ledger) -> list[Any]:
    """Finish what was decided before a crash; the outputs it finished.

    What a sink cannot do now stays decided.
    """
    done = []
    for row in _pending(ledger):
        try:
            _carry_out(ledger, row)
            done.append(row)
        except CasparianError as error:
            log.warning("%s is still %s: %s", row.target, row.state, error.message)
    return done


def _pending(ledger: Ledger) -> list[Any]:
    """Outputs whose sinks may not have been asked yet, with what is to be done."""
    query = f"""
        SELECT n.*, t.state FROM ({NAMED}) n JOIN cf_retracted_output t USING (output_key)
        WHERE t.state <> 'RETRACTED' ORDER BY output_key
        """  # noqa: S608
    return ledger.read(lambda c: list(c.execute(text(query))))


def _carry_out(ledger: Ledger, row: Any) -> None:
    sink = sinks.open_sink(row.location, ledger.database)
    if row.state == Retraction.RETRACTING:
        sink.retract(claim(row))
    else:
        sink.reinstate(claim(row))
    crashpoint("retract.done")

    def settle(connection: Connection) -> None:
        # The state is asked for again: another command may have changed it since the sink did.
        this = RetractedOutput.output_key == row.output_key, RetractedOutput.state == row.state
        if row.state == Retraction.RETRACTING:
            hidden = update(RetractedOutput).where(*this).values(state=Retraction.RETRACTED)
            connection.execute(hidden)
        else:
            connection.execute(delete(RetractedOutput).where(*this))

    ledger.write(settle)
    crashpoint("retract.settled")


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
    return ledger.read(lambda c: list(c.execute(text(query), values)))


def _check_idle(connection: Connection, rows: Sequence[Any]) -> None:
    """Return if no job of these outputs' locations runs or is being published.

    Raises:
        CasparianError: one is.
    """
    query = text(
        f"""
        SELECT min(j.id) FROM cf_processing_queue j
        JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE j.status IN ('RUNNING', 'COMMITTING') AND (r.name, l.path) IN
            (SELECT source, path FROM ({NAMED}) WHERE output_key IN :keys)
        """  # noqa: S608
    ).bindparams(bindparam("keys", expanding=True))
    keys = [row.output_key for row in rows]
    if job := connection.execute(query, {"keys": keys}).scalar():
        raise CasparianError(
            f"job {job} ({rows[0].rel_path}) is running; nothing was changed",
            f"casparian wait --idle, or: casparian jobs show {job}; then the same command again",
        )


def _chosen(rows: Sequence[Any], *, undo: bool) -> list[Any]:
    """The outputs that can be retracted, or reinstated."""
    if undo:
        return [row for row in rows if row.retracted]
    return [row for row in rows if not (row.retracted or row.replaced or row.forgotten)]


def _check_whole(ledger: Ledger, chosen: Sequence[Any]) -> None:
    """Return if each sink holds the outputs whole, so that they can be reinstated later.

    Raises:
        CasparianError: it does not.
    """
    claims = defaultdict(list)
    for row in chosen:
        claims[row.location].append(claim(row))
    for location, group in claims.items():
        if faults := sinks.open_sink(location, ledger.database).check(group):
            raise CasparianError(
                f"{faults[0]}; nothing was changed",
                f"casparian outputs restore {group[0].job_id}, or: casparian outputs forget "
                f"{group[0].job_id}",
            )
