"""What the Sentinel knows of one Worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from casparian_flow.protocol import Receipt


@dataclass
class Peer:
    """A worker that said Hello."""

    name: str
    connection: str
    """The User-Id of the connection it came by; empty for one of our own process."""
    free: int = 0
    seen: float = field(default_factory=time.monotonic)
    held: dict[int, int] = field(default_factory=dict)
    """Job id -> fence of what it runs."""

    def concluded(self, receipt: Receipt) -> None:
        """It runs this attempt no more; it may run a later one of the same job."""
        if self.held.get(receipt.job_id) == receipt.fence:
            del self.held[receipt.job_id]
