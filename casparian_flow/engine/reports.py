"""What a guest says of itself, as the host reads it: checked, and not believed further."""

from __future__ import annotations

from typing import Literal

from casparian_flow.errors import JobError, OutOfMemory, OutputRefused, PluginFailed, PluginTimeout
from casparian_flow.protocol import Record

MESSAGE_LIMIT = 2_000
"""Characters of a guest's message that are kept: they go into the job, its attempt and the audit
log, and a plugin may say anything."""


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
        words = self.message
        if len(words) > MESSAGE_LIMIT:
            words = f"{words[:MESSAGE_LIMIT]}... ({len(words)} characters)"
        if self.kind == "refused":
            return OutputRefused(f"{who}: {words}", "mend the plugin, publish it")
        if "MemoryError" in words.partition(":")[0]:
            limit = f"it may have {memory_bytes >> 20} MiB (memory_bytes under [guest])"
            return OutOfMemory(f"{who} ran out of memory: {words}; {limit}")
        return PluginFailed(f"{who}: {words}", "the traceback is in the job's log")


class Locked(Record, frozen=True):
    """What a guest says holds it, before any code that is not ours has run there."""

    layers: list[str]
    missing: dict[str, str]
    """Layer -> why it is not there."""


def outspent(who: str, seconds: float) -> PluginTimeout:
    """The error of a guest that used up its processor time."""
    what = f"{who} ran longer than {seconds:g} s of processor time and was killed"
    return PluginTimeout(what, "raise cpu_seconds under [guest]")


def outran(who: str, seconds: float, loading: bool) -> PluginTimeout:
    """The error of a guest that outran its wall clock, with a file or with its own imports."""
    if loading:
        what = f"{who} took longer than {seconds:g} s to be imported and was killed"
        return PluginTimeout(what, "have its module do less while it is imported")
    what = f"{who} ran longer than {seconds:g} s and was killed"
    return PluginTimeout(what, "raise timeout_seconds under [jobs]")
