"""What a person changes about jobs: retry them, dismiss their failures, abort them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from casparian_flow.db import failures
from casparian_flow.db import jobs as queue
from casparian_flow.db.access import Ledger
from casparian_flow.db.audit import Event, actor
from casparian_flow.db.states import JobStatus
from casparian_flow.errors import CasparianError, NotFound

CHANGE_CHUNK = 10_000
"""Jobs changed in one transaction."""


def retry(
    ledger: Ledger,
    job_ids: Sequence[int] | None,
    *,
    plugin: str | None = None,
    path: str | None = None,
) -> int:
    """Queue failed or aborted jobs again, with a fresh budget of attempts; how many.

    Superseded ones too, where the store has their version's bytes.

    Args:
        job_ids: None means every FAILED one whose failure is open.
        plugin: of those, only this plugin's.
        path: of those, only the ones of files whose path matches this glob.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some are neither, nor are their bytes kept; the others were queued.
    """
    if job_ids is None:
        job_ids = ledger.read(lambda c: failures.job_ids(c, failures.OPEN, plugin, path))
    wanted = "FAILED or ABORTED, or SUPERSEDED with their version's bytes in the store,"
    return _change(ledger, "retry", queue.retry, job_ids, f"{wanted} can be retried")


def dismiss(ledger: Ledger, job_ids: Sequence[int] | None) -> int:
    """Accept failures, so that nobody counts them any more; how many.

    Args:
        job_ids: None means every one whose file is gone.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some are not FAILED; the others were dismissed.
    """
    if job_ids is None:
        job_ids = ledger.read(lambda c: failures.job_ids(c, failures.GONE_UNREAD))
    return _change(ledger, "dismiss", failures.dismiss, job_ids, "FAILED can be dismissed")


def abort(ledger: Ledger, job_ids: Sequence[int]) -> int:
    """End queued and running jobs; how many. The guest of a running one is killed.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some have ended, or are decided; the others were aborted.
    """
    change = partial(queue.abort, who=actor())
    return _change(ledger, "abort", change, job_ids, "QUEUED or RUNNING can be aborted")


def _change(
    ledger: Ledger,
    verb: str,
    change: Callable[..., list[int]],
    job_ids: Sequence[int],
    which: str,
) -> int:
    def events(changed: Iterable[int]) -> list[Event]:
        return [Event(verb, f"job {job_id}", {}) for job_id in sorted(changed)]

    changed: list[int] = []
    for start in range(0, len(job_ids), CHANGE_CHUNK):
        chunk = job_ids[start : start + CHANGE_CHUNK]
        changed += ledger.change(partial(change, job_ids=chunk), events, wake=False)
    if changed:
        ledger.wake()
    for job_id in sorted(set(job_ids).difference(changed)):
        status = ledger.read(partial(queue.status, job_id=job_id))
        if status is None:
            raise NotFound(f"job {job_id} does not exist", "casparian jobs")
        show = f"casparian jobs show {job_id}"
        if verb == "abort" and status == JobStatus.COMMITTING:
            raise CasparianError(
                f"job {job_id} is COMMITTING: its output is being published and cannot be stopped",
                show,
            )
        raise CasparianError(f"job {job_id} is {status}; only jobs that are {which}", show)
    return len(changed)
