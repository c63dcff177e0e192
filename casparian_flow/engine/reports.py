"""What a guest says of itself, as the host reads it: checked, and not believed further."""

from __future__ import annotations

from typing import Literal

from casparian_flow.protocol import Record


class Failure(Record, frozen=True):
    """What a guest says of an attempt that ended without output."""

    kind: Literal["refused", "exception"]
    message: str
    traceback: str


class Locked(Record, frozen=True):
    """What a guest says holds it, before any code that is not ours has run there."""

    layers: list[str]
    missing: dict[str, str]
    """Layer -> why it is not there."""
