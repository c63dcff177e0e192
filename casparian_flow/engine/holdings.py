"""What a Worker holds by its Sentinel's word, and until when that word is good.

A message may be lost, repeated or late, so the two compare: the Sentinel answers a heartbeat with
what it believes the Worker to hold (`Granted`), and the Worker lets go of what is not in it and
says again what the Sentinel seems not to have heard.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from casparian_flow.protocol import Assignment, Granted, Outcome, Pair, Receipt

SEEN_LIMIT = 10_000
"""Assignments remembered, so that one that is repeated late is not run again."""

SAFE_SHARE = 2 / 3
"""Of the lease: a worker that could not renew it for so long ends its jobs before others have
them."""


@dataclass(frozen=True)
class _Concluded:
    receipt: Receipt
    at: float


class Holdings:
    """Attempts that were assigned to a Worker and are not settled with the Sentinel."""

    def __init__(self) -> None:
        self._held: dict[Pair, _Concluded | None] = {}
        self._seen: dict[Pair, None] = {}
        self._renewed = time.monotonic()

    def take(self, jobs: Sequence[Assignment]) -> list[Assignment]:
        """Those of these assignments that are new to us, which we hold now."""
        new = []
        for job in jobs:
            pair = job.job_id, job.fence
            if pair not in self._seen:
                self._seen[pair] = self._held[pair] = None
                new.append(job)
        while len(self._seen) > SEEN_LIMIT:
            del self._seen[next(iter(self._seen))]
        return new

    def conclude(self, receipts: Iterable[Receipt]) -> None:
        """Keep receipts until the Sentinel is known to have them."""
        now = time.monotonic()
        for receipt in receipts:
            if (receipt.job_id, receipt.fence) in self._held:
                self._held[receipt.job_id, receipt.fence] = _Concluded(receipt, now)

    def compare(self, message: Granted) -> tuple[set[Pair], list[Receipt]]:
        """Agree with the Sentinel: what must be ended, and the receipts to send (again).

        Receipts younger than the heartbeat that is answered are on their way and are not sent.
        """
        granted = set(message.jobs)
        dropped = self._held.keys() - granted
        revoked = {pair for pair in dropped if self._held.pop(pair) is None}
        if not message.sent:
            return revoked, []
        self._renewed = max(self._renewed, message.sent)
        again = []
        for pair in message.jobs:
            if pair not in self._held:
                job_id, fence = pair
                again.append(Receipt(job_id=job_id, fence=fence, outcome=Outcome.RELEASED))
            elif (ended := self._held[pair]) and ended.at < message.sent:
                again.append(ended.receipt)
        return revoked, again

    def running(self) -> set[Pair]:
        """What is assigned to us and has not ended."""
        return {pair for pair, ended in self._held.items() if ended is None}

    def renewed(self) -> None:
        """The Sentinel has let us in, anew or for the first time."""
        self._renewed = time.monotonic()

    def safe_for(self, lease_seconds: float) -> float:
        """Seconds for which what we hold is certainly ours; not above 0 when we must let go."""
        return self._renewed + lease_seconds * SAFE_SHARE - time.monotonic()
