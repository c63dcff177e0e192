"""What a person does about an output that is gone or altered: forget it, or have it made again.

An output that its sink holds whole is left alone by both: first comes the deletion, then the word.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs, outputs, wiring
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import JobStatus
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.errors import CasparianError, NotFound
from casparian_flow.services.changes import ring


def forget(ledger: Ledger, name: str) -> list[str]:
    """Claim outputs no more that are gone or altered: `verify` is content, and queries pass them
    over. What the sink still has of them is left as it is. Their targets.

    Args:
        name: a job's id, or an output's target as `casparian outputs list` shows it, or as a path
            from the current directory.

    Raises:
        NotFound: no published output has that name.
        CasparianError: the sink holds it whole.
    """
    broken = [row for row in _broken(ledger, _named(ledger, name), name) if not row.forgotten]

    def work(connection: Connection) -> None:
        outputs.forget(connection, [row.output_key for row in broken])
        for row in broken:
            wiring.note(
                connection, "forget", [f"output {row.target}"], job=row.job_id, rows=row.rows
            )

    ledger.write(work)
    return [row.target for row in broken]


def restore(ledger: Ledger, settings: Settings, name: str) -> list[int]:
    """Have outputs that are gone or altered made again from their versions; the jobs queued.

    Args:
        name: as for `forget`; what was forgotten may be restored.

    Raises:
        NotFound: no published output has that name.
        CasparianError: the sink holds it whole, its job is at work, or the version's bytes are
            neither in its snapshot nor in its file any more; nothing was changed.
        SinkConflict: an altered file stands in its place.
    """
    broken = _broken(ledger, _named(ledger, name), name)
    for row in broken:
        _check_bytes(row, settings)
    for row in broken:
        sinks.open_sink(row.location, ledger.database).withdraw(claim(row))
    crashpoint("outputs.withdrawn")

    def work(connection: Connection) -> list[int]:
        queued = jobs.remake(connection, sorted({row.job_id for row in broken}))
        remade = [row for row in broken if row.job_id in queued]
        outputs.unpublish(connection, [row.output_key for row in remade])
        for row in remade:
            wiring.note(connection, "restore", [f"output {row.target}"], job=row.job_id)
        return queued

    queued = ledger.write(work)
    ring(settings)
    return queued


def _named(ledger: Ledger, name: str) -> list[Any]:
    """The published outputs that a person means.

    Raises:
        NotFound: there are none.
        CasparianError: nobody is to see them: they are retracted or replaced.
    """
    rows = ledger.read(lambda c: outputs.named(c, name) or outputs.named(c, os.path.abspath(name)))
    if not rows:
        raise NotFound(f"no published output is named {name}", "casparian outputs list")
    if all(row.retracted for row in rows):
        raise CasparianError(
            f"{name} is retracted; nothing was changed",
            f"casparian retract --undo {rows[0].version_id}",
        )
    due = [row for row in rows if not (row.retracted or row.replaced)]
    if not due:
        raise CasparianError(
            f"{name} was replaced by a later output of its file; nothing was changed",
            "casparian outputs list",
        )
    return due


def _broken(ledger: Ledger, rows: Sequence[Any], name: str) -> list[Any]:
    """Those that their sinks do not hold whole.

    Raises:
        CasparianError: there are none.
    """

    def is_whole(row: Any) -> bool:
        return not sinks.open_sink(row.location, ledger.database).check([claim(row)])

    broken = [row for row in rows if not is_whole(row)]
    if not broken:
        raise CasparianError(
            f"{name} is there, and whole; nothing was changed",
            "delete it in its sink first, if it is to go",
        )
    return broken


def claim(row: Any) -> Claim:
    """What the ledger says of an output, from a row of `outputs.NAMED`."""
    return Claim(
        topic=row.topic, output_key=row.output_key, job_id=row.job_id, target=row.target,
        rows=row.rows, digest=row.digest,
    )  # fmt: skip


def _check_bytes(row: Any, settings: Settings) -> None:
    """Return if the output can be made again from the bytes of its version: its snapshot, which
    has outlived the file perhaps, or the file.

    Raises:
        CasparianError: why not.
    """
    if row.status != JobStatus.COMPLETED:
        raise CasparianError(
            f"job {row.job_id} is {row.status or 'of an earlier ledger'}; only what a completed "
            "job gave can be restored",
            f"casparian jobs show {row.job_id}",
        )
    if row.kept and _digest(settings.database.snapshot(row.content_hash)) == row.content_hash:
        return
    found = _digest(os.path.join(os.fsencode(row.root_path), row.path))
    if found != row.content_hash:
        raise CasparianError(
            f"{row.rel_path} {'has changed' if found else 'is gone'} since version {row.ordinal}, "
            f"and no whole snapshot has the bytes of job {row.job_id}; nothing was changed",
            f"put that content back, or: casparian outputs forget {row.job_id}",
        )


def _digest(path: bytes | Path) -> str:
    """SHA-256 of a file, hexadecimal; empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
