"""The processes of the product: started, watched, killed.

Each dies with us (the kernel sees to it), so that an interrupted run leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

from proofs.chaos.place import Place
from proofs.chaos.readers import Complain

CREWS = {
    "start": ["daemon"],
    "main": ["sentinel", "worker", "worker"],
    "drain": ["drain"],
}
"""Three ways to run it: all in one process, over TCP, and from cron without a daemon."""

SCAN_CODES = {0, 3}
"""How a one-shot may end: done, or with files that would not settle."""

REST_SECONDS = 300.0
STOP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)


class Hand(NamedTuple):
    """One process of a crew."""

    role: str
    process: subprocess.Popen[bytes]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Crew:
    """Everything of the product that runs in one place.

    Args:
        place: where.
        complain: told when a process ends that nobody killed.
    """

    def __init__(self, place: Place, complain: Complain) -> None:
        self._place = place
        self._complain = complain
        self.hands: list[Hand] = []

    def man(self, roles: list[str]) -> None:
        """Start whatever of these does not run."""
        self._bury()
        missing = list(roles)
        for hand in self.hands:
            if hand.role in missing:
                missing.remove(hand.role)
        for role in missing:
            self.start(role)

    def start(self, role: str) -> Hand:
        """Start one process; what it says is kept in the logs."""
        worker = ["-m", "casparian_flow.engine.worker_client", "--connect"]
        commands = {
            "daemon": self._place.command("start"),
            "scan": self._place.command("scan"),
            "drain": self._place.command("scan", "--drain"),
            "sentinel": [
                sys.executable, "-m", "casparian_flow.main", "--config", str(self._place.config),
            ],
            "worker": [sys.executable, *worker, self._place.settings.listen.endpoint],
        }  # fmt: skip
        with (self._place.logs / f"{role}.log").open("ab") as log:
            process = subprocess.Popen(
                commands[role], cwd=self._place.flow, stdin=subprocess.DEVNULL, stdout=log,
                env={**os.environ, "TMPDIR": str(self._place.temporary)},
                stderr=log, start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509 - it takes no lock
            )  # fmt: skip
        hand = Hand(role, process)
        self.hands.append(hand)
        return hand

    def kill(self, hand: Hand) -> bool:
        """SIGKILL; False where it had ended before."""
        if not hand.alive:
            self._bury()
            return False
        self.hands.remove(hand)
        hand.process.kill()
        status: int = hand.process.wait()
        return status == -signal.SIGKILL

    def kill_all(self) -> int:
        """SIGKILL for all of them at once, as when a machine goes down; how many there were."""
        hands = [hand for hand in self.hands if hand.alive]
        for hand in hands:
            hand.process.kill()
        for hand in hands:
            hand.process.wait()
            self.hands.remove(hand)
        self._bury()
        return len(hands)

    def guests(self) -> list[psutil.Process]:
        """Processes that run plugin code now; not those that only try the sandbox."""
        home = str(self._place.settings.database.guests_folder)
        found = []
        for hand in self.hands:
            try:
                children = psutil.Process(hand.process.pid).children(recursive=True)
                found += [child for child in children if home in " ".join(child.cmdline())]
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_for(self, what: Callable[[], bool], seconds: float) -> bool:
        """Look until it is so; False when it was not in time, or nobody is there any more."""
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until or not any(hand.alive for hand in self.hands):
                return False
            time.sleep(0.02)
        return True

    def rest(self, note: Callable[..., None]) -> None:
        """With a daemon, let everything come to its end; then stop it and be alone.

        Args:
            note: told of jobs that were given up and are retried, as a person would.
        """
        daemon = self.start("daemon")
        self._idle(daemon)
        query = "SELECT id FROM cf_processing_queue WHERE status = 'FAILED'"
        if failed := [str(job) for (job,) in self._place.ask(query)]:
            note("retry", jobs=len(failed))
            retried = self._place.run("jobs", "retry", *failed)
            if retried.returncode:
                self._complain("lost", f"jobs retry: {retried.returncode}: {retried.stderr}")
            self._idle(daemon)
        daemon.process.terminate()
        try:
            status = daemon.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._complain("left", f"the daemon did not stop within {STOP_SECONDS:g} s")
            self.kill(daemon)
            return
        self.hands.remove(daemon)
        if status:
            self._complain("left", f"the daemon stopped with exit code {status}")

    def _idle(self, daemon: Hand) -> None:
        until = time.monotonic() + REST_SECONDS
        while True:
            waited = self._place.run("wait", "--idle", "--timeout", f"{REST_SECONDS:g}")
            if waited.returncode == 0:
                return
            if not daemon.alive or time.monotonic() > until:
                self._complain("lost", f"it does not come to rest: {waited.stderr}")
                return

    def _bury(self) -> None:
        """Forget who has ended by itself, and say so where it should not have."""
        for hand in [hand for hand in self.hands if not hand.alive]:
            self.hands.remove(hand)
            code = hand.process.returncode
            if hand.role not in ("scan", "drain") or code not in SCAN_CODES:
                log = self._place.logs / f"{hand.role}.log"
                self._complain("left", f"the {hand.role} ended by itself with {code}; see {log}")


def pick(guests: list[psutil.Process], chance: random.Random) -> psutil.Process | None:
    """One guest, whichever."""
    return chance.choice(guests) if guests else None


def kill_process(process: psutil.Process) -> bool:
    """SIGKILL for a process that is not our child; False where it was gone."""
    try:
        alive = bool(process.status() != psutil.STATUS_ZOMBIE)
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return alive


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
