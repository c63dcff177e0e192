"""The states that rows of the ledger have, which of them follow on which, and the time of now."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum


def utcnow() -> datetime:
    """Now, in UTC, without a zone: the form of every `_at` column."""
    return datetime.now(UTC).replace(tzinfo=None)


PAUSED = "paused: "
"""Prefix of the `reason` of a job that waits for a sink or the machine, not for its own retry."""

TAKEN = "the file belongs to table "
"""What the reason of an aborted job of a catch-all plugin begins with, if a table took its file."""

PASSED_OVER = (
    "not deleted: scans now ignore it (an ignore pattern, or one of Casparian Flow's own files)"
)
"""The `problem` of a location that is still on the disk and that scans pass over."""


class JobStatus(StrEnum):
    """The state of a job; docs/job_lifecycle.md draws the arrows."""

    QUEUED = "QUEUED"
    """Waits for a worker, or for `not_before`."""
    RUNNING = "RUNNING"
    """A worker holds it under the current fence."""
    COMMITTING = "COMMITTING"
    """Decided: its output will be published, whatever happens."""
    COMPLETED = "COMPLETED"
    """Every output is visible in its sink."""
    FAILED = "FAILED"
    """Its attempts are used up, or its error would repeat."""
    ABORTED = "ABORTED"
    """Aborted by a user."""
    SUPERSEDED = "SUPERSEDED"
    """The version's bytes were gone or changed before it could run."""


class OutputState(StrEnum):
    """The state of an output."""

    PLANNED = "PLANNED"
    PUBLISHED = "PUBLISHED"
    REFUSED = "REFUSED"


REMOVED = "removed"
"""The state of an output in `Visibility` whose rows the sink has no more: it was replaced long ago,
or forgotten. Else the state is a `protocol.State`."""


JOB_ARROWS = {
    "": {"QUEUED", "COMPLETED"},
    "QUEUED": {"RUNNING", "ABORTED", "SUPERSEDED", "COMPLETED"},
    "RUNNING": {"COMMITTING", "QUEUED", "FAILED", "ABORTED", "SUPERSEDED"},
    "COMMITTING": {"COMPLETED", "FAILED"},
    "COMPLETED": {"QUEUED"},
    "FAILED": {"QUEUED", "COMPLETED"},
    "ABORTED": {"QUEUED", "COMPLETED"},
    "SUPERSEDED": {"QUEUED", "COMPLETED"},
}
"""Status -> those it may change to; empty for no row. Triggers of the database enforce the same.

A job becomes COMPLETED without having run where a sink has its outputs (`db.adopt`)."""

OUTPUT_ARROWS = {
    "": {"PLANNED", "PUBLISHED"},
    "PLANNED": {"PUBLISHED", "REFUSED", ""},
    "PUBLISHED": {"PLANNED"},
    "REFUSED": {""},
}
"""State -> those it may change to; a new plan deletes outputs that were not published. What a sink
had before this ledger is PUBLISHED from the beginning."""


KEEP, RETRACT = ON_DELETE = ("keep", "retract")
"""What becomes of a deleted file's rows: they stay, or are hidden until it is back."""
