"""What is kept of an attempt that ended badly: signal, exit status, rows, memory, in words."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

from casparian_flow.engine.bridge import Guest
from casparian_flow.errors import (
    GuestDied,
    GuestKilled,
    JobError,
    OutOfMemory,
    PluginFailed,
    Unavailable,
)
from casparian_flow.protocol import Evidence
from tests.daemons import guests
from tests.engine.guests import SECONDS, file_info, loaded, plugin, run

Start = Callable[..., Guest]


def ended(guest: Guest, kind: type[JobError]) -> tuple[str, Evidence]:
    """Run a guest that fails; the words, and what was seen."""
    with guest, pytest.raises(kind) as raised:
        guest.load()
        run(guest)
    return raised.value.message, guest.evidence


def test_a_crash_has_its_signal_and_what_came_before(start: Start) -> None:
    body = "self.publish('t', pa.table({'n': [1, 2, 3]}))\nimport os, signal\nos.abort()"
    words, seen = ended(start(plugin(body)), GuestDied)
    assert "was killed by SIGABRT" in words
    assert (seen.signal, seen.exit_code) == ("SIGABRT", None)
    assert (seen.batches, seen.rows) == (1, 3)
    assert seen.max_rss_bytes > 1 << 20
    assert seen.cpu_seconds > 0


def test_an_exit_has_its_status(start: Start) -> None:
    words, seen = ended(start(plugin("import os\nos._exit(7)")), GuestDied)
    assert "ended with exit status 7" in words
    assert (seen.signal, seen.exit_code) == ("", 7)


def test_a_plugin_that_raises_lives_on_and_is_measured(start: Start) -> None:
    _, seen = ended(start(plugin("sum(range(3_000_000))\nraise ValueError('no')")), PluginFailed)
    assert seen.cpu_seconds > 0.01
    assert seen.max_rss_bytes > 1 << 20


def test_its_own_memory_limit_is_named(start: Start) -> None:
    guest = start(plugin("bytearray(1 << 40)"), memory_bytes=2 << 30)
    words, _ = ended(guest, OutOfMemory)
    assert "ran out of memory: MemoryError; the limit is 2048 MiB (memory_bytes under [guest])" in (
        words
    )


def test_a_kill_from_outside_is_told_from_ours(start: Start) -> None:
    hangs = "import time\nself.publish('t', pa.table({'n': [1]}))\ntime.sleep(3600)"
    batches = loaded(start, hangs).run(file_info(), SECONDS)
    next(batches)
    (process,) = guests()
    process.kill()
    with pytest.raises(GuestKilled) as raised:
        next(batches)
    assert raised.value.message.endswith("was killed by SIGKILL, sent by another program")
    other = loaded(start, hangs)
    batches = other.run(file_info(), SECONDS)
    next(batches)
    other.interrupt()
    with pytest.raises(GuestDied, match="was killed"):
        next(batches)


def test_the_kernels_count_of_kills_for_memory_decides(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that really runs out would take the tests with it."""
    guest = start(plugin("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    monkeypatch.setattr("casparian_flow.engine.guest_process.oom_kills", lambda: 1 << 60)
    words, seen = ended(guest, OutOfMemory)
    assert "out of memory" in words
    assert seen.signal == "SIGKILL"


@pytest.mark.parametrize("spare", range(6))
def test_no_descriptor_left_is_a_fault_of_the_machine(start: Start, spare: int) -> None:
    """Whichever of those it needs is the one that is not to be had; the fixture counts leaks."""
    opened = len(os.listdir("/proc/self/fd")) - 1
    limits: Any = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    holes = [os.dup(0) for _ in range(highest + 1 - opened)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max([highest, *holes]) + 1 + spare, limits[1]))
    try:
        with pytest.raises(Unavailable, match="Too many open files"):
            start(plugin("pass"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for hole in holes:
            os.close(hole)
