"""A Worker and its Sentinel agree again, whatever was lost, repeated or late."""

from __future__ import annotations

import time

import pytest

from casparian_flow.engine.worker_client import SEEN_LIMIT, Holdings
from casparian_flow.protocol import Assignment, Granted, Outcome, Receipt


def assignment(job_id: int, fence: int = 1) -> Assignment:
    return Assignment(
        job_id=job_id, fence=fence, attempt="", plugin_id=1, plugin_version="1", version_id=1,
        source="", path=b"", rel_path="", content_hash="", size_bytes=0, timeout_seconds=1.0,
        outputs=[],
    )  # fmt: skip


def receipt(job_id: int, fence: int = 1) -> Receipt:
    return Receipt(job_id=job_id, fence=fence, outcome=Outcome.STAGED)


def later() -> float:
    """A heartbeat that is sent after all that was done until now."""
    now = time.monotonic()
    while time.monotonic() == now:
        pass
    return time.monotonic()


@pytest.fixture
def holdings() -> Holdings:
    found = Holdings()
    found.take([assignment(1), assignment(2)])
    return found


def test_what_is_assigned_twice_is_run_once(holdings: Holdings) -> None:
    new = holdings.take([assignment(1), assignment(1, fence=2), assignment(3), assignment(3)])
    assert [(job.job_id, job.fence) for job in new] == [(1, 2), (3, 1)]
    holdings.conclude([receipt(1)])
    holdings.compare(Granted(jobs=[], sent=later()))
    assert holdings.take([assignment(1)]) == []


def test_what_was_taken_away_is_ended(holdings: Holdings) -> None:
    holdings.conclude([receipt(2)])
    assert holdings.compare(Granted(jobs=[])) == ({(1, 1)}, [])
    assert holdings.running() == set()


def test_a_receipt_that_was_lost_is_sent_again_until_it_is_known(holdings: Holdings) -> None:
    holdings.conclude([receipt(1)])
    lost = Granted(jobs=[(1, 1), (2, 1)], sent=later())
    assert holdings.compare(lost) == (set(), [receipt(1)])
    assert holdings.compare(lost) == (set(), [receipt(1)])
    assert holdings.compare(Granted(jobs=[(2, 1)], sent=later())) == (set(), [])
    assert holdings.running() == {(2, 1)}


def test_a_receipt_that_is_on_its_way_is_not(holdings: Holdings) -> None:
    sent = later()
    holdings.conclude([receipt(1)])
    assert holdings.compare(Granted(jobs=[(1, 1), (2, 1)], sent=sent)) == (set(), [])


def test_what_never_came_is_released(holdings: Holdings) -> None:
    granted = Granted(jobs=[(1, 1), (2, 1), (9, 4)], sent=later())
    released = Receipt(job_id=9, fence=4, outcome=Outcome.RELEASED)
    assert holdings.compare(granted) == (set(), [released])


def test_receipts_of_what_we_do_not_hold_are_not_kept(holdings: Holdings) -> None:
    holdings.conclude([receipt(7)])
    assert holdings.compare(Granted(jobs=[], sent=later())) == ({(1, 1), (2, 1)}, [])


def test_the_memory_of_assignments_is_bounded() -> None:
    holdings = Holdings()
    for job in range(SEEN_LIMIT + 5):
        holdings.take([assignment(job)])
    assert holdings.take([assignment(SEEN_LIMIT)]) == []
    assert len(holdings.take([assignment(0)])) == 1


def test_the_lease_counts_from_when_the_answered_heartbeat_was_sent(holdings: Holdings) -> None:
    began = later()
    holdings.renewed()
    assert holdings.safe_for(0.0) <= 0
    assert 0 < holdings.safe_for(3e6) <= 2e6
    holdings.compare(Granted(jobs=[], sent=began + 1e6))
    assert holdings.safe_for(0.0) > 9e5
    holdings.compare(Granted(jobs=[], sent=began))  # late: it renews nothing
    assert holdings.safe_for(0.0) > 9e5
