"""A wire between Sentinel and Workers that loses, repeats and delays messages."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from casparian_flow import protocol
from casparian_flow.engine import worker_client
from casparian_flow.engine.sentinel import Sentinel
from casparian_flow.engine.worker_client import Worker

SPARED = (protocol.Drain, protocol.Goodbye)
"""Without these a stop only takes its whole grace, which is a matter of time and nothing else."""

DELAY_SECONDS = 0.3


@contextlib.contextmanager
def lossy(seed: int, share: float = 0.15) -> Iterator[Counter[str]]:
    """While the block runs, lose, repeat and delay that share of all messages each.

    Yields:
        What was done to how many.
    """
    chance = random.Random(seed)
    tally: Counter[str] = Counter(lost=0, repeated=0, delayed=0, passed=0)
    late: set[asyncio.Task[None]] = set()

    def spoiled(send: Any) -> Any:
        async def deliver(self: Any, *arguments: Any, **options: Any) -> None:
            fate = chance.random() / share
            if isinstance(arguments[-1], SPARED) or fate >= 3:
                tally["passed"] += 1
                await send(self, *arguments, **options)
            elif fate < 1:
                tally["lost"] += 1
            elif fate < 2:
                tally["repeated"] += 1
                for _ in range(2):
                    await send(self, *arguments, **options)
            else:
                tally["delayed"] += 1
                pause = chance.uniform(0, DELAY_SECONDS)
                late.add(asyncio.create_task(_later(pause, send, self, *arguments)))

        return deliver

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_client, "HEARTBEAT_SECONDS", 0.1)
        patch.setattr(worker_client, "FETCH_SECONDS", 0.5)
        for end in (Sentinel, Worker):
            patch.setattr(end, "_send", spoiled(end._send))
        yield tally


async def _later(seconds: float, send: Any, *arguments: Any) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(Exception):  # the socket may be closed by now
        await send(*arguments)
