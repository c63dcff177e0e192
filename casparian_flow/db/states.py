"""Where a job and an output can be: the words of the status columns."""

from __future__ import annotations

from enum import StrEnum

PAUSED = "paused: "
"""Begins the `reason` of a job that waits for a sink or the machine, not for its own retry."""


class JobStatus(StrEnum):
    """Where a job is; docs/job_lifecycle.md draws the arrows."""

    QUEUED = "QUEUED"
    """Waits for a worker, or for `not_before`."""
    RUNNING = "RUNNING"
    """A worker holds it under the current fence."""
    COMMITTING = "COMMITTING"
    """Decided: its output will be published, whatever happens."""
    COMPLETED = "COMPLETED"
    """Every output is visible in its sink."""
    FAILED = "FAILED"
    """Attempts used up, or an error that would repeat: the dead letters."""
    ABORTED = "ABORTED"
    """A person said no."""
    SUPERSEDED = "SUPERSEDED"
    """The version's bytes were gone or changed before it could run."""


class OutputState(StrEnum):
    """Where an output is."""

    PLANNED = "PLANNED"
    PUBLISHED = "PUBLISHED"
    REFUSED = "REFUSED"


class Retraction(StrEnum):
    """Where a retracted output is; the sink is asked between the first word and the second."""

    RETRACTING = "RETRACTING"
    RETRACTED = "RETRACTED"
    REINSTATING = "REINSTATING"


JOB_ARROWS = {
    "": {"QUEUED"},
    "QUEUED": {"RUNNING", "ABORTED", "SUPERSEDED"},
    "RUNNING": {"COMMITTING", "QUEUED", "FAILED", "ABORTED", "SUPERSEDED"},
    "COMMITTING": {"COMPLETED", "FAILED"},
    "COMPLETED": {"QUEUED"},
    "FAILED": {"QUEUED"},
    "ABORTED": {"QUEUED"},
    "SUPERSEDED": {"QUEUED"},
}
"""Where a job may go from each status, and from nothing; triggers of the database say the same."""

OUTPUT_ARROWS = {
    "": {"PLANNED"},
    "PLANNED": {"PUBLISHED", "REFUSED", ""},
    "PUBLISHED": {"PLANNED"},
    "REFUSED": {""},
}
"""Where an output may go; to nothing, since a new plan forgets what was not published."""
