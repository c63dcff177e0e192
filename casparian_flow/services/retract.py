"""Taking one file's rows out of readers' sight, and bringing them back.

    decide      the ledger says what is to become of each output, with its audit row
    ask         each sink moves the rows; asking twice is asking once
    settle      the ledger says that it is done

From the first step on no query and no `verify` claims the rows. A crash after it is rolled forward
by the next `casparian retract`, and by the daemon when it starts.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import retracted, wiring
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Retraction
from casparian_flow.engine import sinks
from casparian_flow.errors import CasparianError, NotFound
from casparian_flow.services.changes import ring
from casparian_flow.services.outputs import claim

_LACK = {
    False: "nothing of {} is to be seen: it was retracted, replaced or forgotten",
    True: "nothing of {} is retracted",
}

log = logging.getLogger(__name__)


def retract(ledger: Ledger, settings: Settings, name: str, *, undo: bool = False) -> list[Any]:
    """Take back what a location's versions, or one version, gave; the outputs that it concerned.

    Args:
        name: a version's id, or a location: a path from here, or `source/rel_path`.
        undo: bring back what was taken back.

    Raises:
        NotFound: no such location or version, or nothing of it is to be seen (`undo`: retracted).
        CasparianError: a job of it is at work, or what stands in a sink is not whole; nothing was
            changed.
        SinkConflict, SinkUnavailable: a sink could not do it; it is decided, and done by the next
            call, or when the daemon starts.
    """
    done = {row.output_key: row for row in roll_forward(ledger)}
    named = _named(ledger, name)
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
        (retracted.reinstating if undo else retracted.retracting)(connection, keys)
        for row in chosen:
            wiring.note(
                connection, "reinstate" if undo else "retract", [f"output {row.target}"],
                job=row.job_id, version=row.version_id, rows=row.rows, key=row.output_key,
            )  # fmt: skip

    ledger.write(work)
    crashpoint("retract.decided")
    for row in ledger.read(retracted.pending):
        if row.output_key in keys:
            _carry_out(ledger, row)
    ring(settings)
    return chosen


def roll_forward(ledger: Ledger) -> list[Any]:
    """Finish what was decided before a crash, and say what that was. What a sink cannot do now
    stays decided."""
    done = []
    for row in ledger.read(retracted.pending):
        try:
            _carry_out(ledger, row)
            done.append(row)
        except CasparianError as error:
            log.warning("%s is still %s: %s", row.target, row.state, error.message)
    return done


def _carry_out(ledger: Ledger, row: Any) -> None:
    sink = sinks.open_sink(row.location, ledger.database)
    if row.state == Retraction.RETRACTING:
        sink.retract(claim(row))
    else:
        sink.reinstate(claim(row))
    crashpoint("retract.done")
    ledger.write(lambda c: retracted.settle(c, row.output_key))
    crashpoint("retract.settled")


def _named(ledger: Ledger, name: str) -> list[Any]:
    """Every output of what a person means.

    Raises:
        NotFound: there is none.
    """
    if name.isdecimal():
        rows = ledger.read(lambda c: retracted.of_version(c, int(name)))
    else:
        rows = ledger.read(
            lambda c: [
                row
                for root, path, shown in wiring.meant(c, name)
                for row in retracted.of_location(c, root.name, path, shown)
            ]
        )
    if not rows:
        raise NotFound(
            f"nothing was published of {name}", "casparian outputs list   (casparian versions PATH)"
        )
    return rows


def _check_idle(connection: Connection, rows: Sequence[Any]) -> None:
    """Return if no job of these outputs' locations is about to publish.

    Raises:
        CasparianError: one is.
    """
    if job := retracted.at_work(connection, [row.output_key for row in rows]):
        raise CasparianError(
            f"job {job} of {rows[0].rel_path} is at work; nothing was changed",
            f"casparian wait, or: casparian jobs show {job}; then again",
        )


def _chosen(rows: Sequence[Any], *, undo: bool) -> list[Any]:
    """Those that can be retracted, or reinstated."""
    if undo:
        return [row for row in rows if row.retracted]
    return [row for row in rows if not (row.retracted or row.replaced or row.forgotten)]


def _check_whole(ledger: Ledger, chosen: Sequence[Any]) -> None:
    """Return if each sink holds what is to be taken back, so that it can be brought back.

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
