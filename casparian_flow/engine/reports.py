"""What a guest says of itself, as the host reads it: checked, and not believed further."""

from __future__ import annotations

from typing import Literal

from casparian_flow.errors import JobError, OutOfMemory, OutputRefused, PluginFailed
from casparian_flow.protocol import Record


class Failure(Record, frozen=True):
    """What a guest says of an attempt that ended without output."""

    kind: Literal["refused", "exception"]
    message: str
    traceback: str

    def error(self, who: str, memory_bytes: int) -> JobError:
        """What it means for the job.

        Args:
            who: whose guest said it.
            memory_bytes: what it may have.
        """
        if self.kind == "refused":
            return OutputRefused(f"{who}: {self.message}", "mend the plugin, publish it")
        if "MemoryError" in self.message.partition(":")[0]:
            limit = f"it may have {memory_bytes >> 20} MiB (memory_bytes under [guest])"
            return OutOfMemory(f"{who} ran out of memory: {self.message}; {limit}")
        return PluginFailed(f"{who}: {self.message}", "the traceback is in the job's log")


class Locked(Record, frozen=True):
    """What a guest says holds it, before any code that is not ours has run there."""

    layers: list[str]
    missing: dict[str, str]
    """Layer -> why it is not there."""
