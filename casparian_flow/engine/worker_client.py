"""A Worker: pulls jobs from the Sentinel, runs them in guests, sends a receipt for each.

Inside the daemon it is a task over an inproc socket; alone it is

    python -m casparian_flow.engine.worker_client --connect tcp://localhost:5555

which finds the Sentinel by the key that one left (`engine.wire`), and waits for one that is not
up yet. It reads no ledger. What it needs of a job is in the assignment, and what it made of it is
staged on the disk that it shares with the Sentinel.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from casparian_flow import protocol
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine import canary, wire
from casparian_flow.engine.runner import Runner, released
from casparian_flow.errors import CasparianError, DaemonGone, ExitCode, ProtocolError, leave
from casparian_flow.protocol import (
    AnyMessage,
    Artifact,
    Assignment,
    Conclude,
    Granted,
    Outcome,
    Pair,
    Receipt,
)
from casparian_flow.security import sandbox

log = logging.getLogger(__name__)


# What a Worker holds by its Sentinel's word, and until when that word is good.
#
# A message may be lost, repeated or late, so the two compare: the Sentinel answers a heartbeat with
# what it believes the Worker to hold (`Granted`), and the Worker lets go of what is not in it and
# says again what the Sentinel seems not to have heard.


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


# One thread for all that a worker does with its guests, which no end of the process waits for.
#
# The kernel kills a guest when the thread that started it ends, so it is one for life. A call in it
# may hang for good, in a filesystem that does not answer or in a fault of ours.
# `ThreadPoolExecutor` would make the process wait for it at its end, whatever signal came.


T = TypeVar("T")


class OneThread:
    """Runs one call after another; it starts with the first."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Any] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Have a call made after those before it; its outcome comes to this event loop."""
        if not self._thread.is_alive():
            self._thread.start()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, call))
        return asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let the thread end when it has done what it was given."""
        self._calls.put(None)

    def leave_behind(self) -> None:
        """Have the process end without what runs here: with `ExitCode.DAEMON` if it still runs.

        Once the interpreter takes itself apart, a thread in foreign code may crash it.
        """
        atexit.register(self._end)

    def _end(self) -> None:
        if self._thread.is_alive():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(ExitCode.DAEMON)

    def _run(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                outcome = call()
            except BaseException as error:  # noqa: BLE001  whoever waits for it gets it
                future.set_exception(error)
            else:
                future.set_result(outcome)


HEARTBEAT_SECONDS = 5.0
"""How often a worker says that it lives, however busy its thread is; more often where its lease
is short."""

HEARTBEATS = 6
"""Heartbeats in the time of a lease, at least."""

KEY_SECONDS = 0.5
"""How often a worker of another process looks whether a Sentinel has left a new key."""

FETCH_SECONDS = 10.0
"""How long an artifact may take before it is asked for again: a message may be lost."""

HUNG_SECONDS = 2.0
"""How long what was killed may take to come to its end, before it is left behind."""

CLOSE_SECONDS = 1.0
"""How long letting the guests go may take; what is left of them ends with this process."""

PREFETCH_SECONDS = 0.25
"""Work a worker asks for ahead: many jobs where they are short, one where they are long."""

PREFETCH_LIMIT = 32


class Worker:
    """Serves one Sentinel until drained or cancelled.

    Args:
        name: unique among the Sentinel's workers.
        context: the process's zmq context (inproc sockets meet in one context only).
        endpoint: where the Sentinel listens: an inproc address, or TCP with a host in numbers.
        cache: where environments are kept.
    """

    def __init__(self, name: str, context: zmq.asyncio.Context, endpoint: str, cache: Path) -> None:
        self._name = name
        self._cache = cache
        self._endpoint = endpoint
        self._socket = context.socket(zmq.DEALER)
        wire.tune(self._socket)
        self._thread = OneThread(f"worker-{name}")
        self._runner: Runner | None = None
        self._jobs: asyncio.Queue[list[Assignment]] = asyncio.Queue()
        self._artifacts: dict[int, asyncio.Future[Artifact]] = {}
        self._holdings = Holdings()
        self._lease = 0.0
        self._welcome: protocol.Welcome | None = None
        """What a later Sentinel said, while our Runner still serves an earlier one."""
        self._welcomed = False
        self._pace = PREFETCH_SECONDS
        self._draining = asyncio.Event()
        self._hung = asyncio.Event()

    async def run(self) -> None:
        """Introduce ourselves, then serve until the Sentinel says Drain.

        Raises:
            DaemonGone: this worker cannot serve that Sentinel; the message says why.
            ConfigError: the Sentinel's key cannot be read, or could be somebody else's.
            SandboxUnavailable: the sandbox is required, and does not hold here.
        """
        loops = [self._listen(), self._work(), self._beat(), self._wait_in_vain()]
        if self._alone:
            loops.append(self._follow())
        else:
            self._socket.connect(self._endpoint)
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._leave()

    @property
    def _alone(self) -> bool:
        """Whether the Sentinel is in another process: nobody has then tried our sandbox."""
        return not self._endpoint.startswith("inproc:")

    def stop(self, grace_seconds: float) -> None:
        """Take no further job; the running one may finish within the grace, then it is killed."""
        if self._draining.is_set() or self._runner is None:
            self._draining.set()
            return
        self._draining.set()
        self._runner.halt()
        loop = asyncio.get_running_loop()
        loop.call_later(grace_seconds, self._runner.halt, True)
        loop.call_later(grace_seconds + HUNG_SECONDS, self._hung.set)

    async def _leave(self) -> None:
        if self._runner:
            self._runner.halt(kill=True)
            closing = self._thread.run(self._runner.close)
            done, _ = await asyncio.wait([closing], timeout=CLOSE_SECONDS)
            if not done:
                log.error("worker %s hangs in a call; it is left behind, and its jobs go back to "
                          "the queue", self._name)  # fmt: skip
                self._thread.leave_behind()
        self._thread.stop()
        with contextlib.suppress(zmq.ZMQError):
            await self._send(protocol.Goodbye(), flags=zmq.NOBLOCK)
        self._socket.close()

    async def _wait_in_vain(self) -> None:
        """Until what we were told to end has not ended; nobody can end a call that hangs."""
        await self._hung.wait()

    async def _listen(self) -> None:
        await self._send(protocol.Hello(worker=self._name))
        while True:
            try:
                message = protocol.decode(await self._socket.recv_multipart())
            except ProtocolError as error:
                log.warning("worker %s dropped a message: %s", self._name, error)
                continue
            await self._hear(message)

    async def _hear(self, message: AnyMessage) -> None:
        match message:
            case protocol.Unknown():
                await self._send(protocol.Hello(worker=self._name))
            case protocol.Welcome():
                await self._begin(message)
            case protocol.Assign(jobs=jobs):
                if new := self._holdings.take(jobs):
                    self._jobs.put_nowait(new)
            case protocol.Granted():
                await self._compare(message)
            case protocol.Artifact(plugin_id=plugin_id):
                if (future := self._artifacts.get(plugin_id)) and not future.done():
                    future.set_result(message)
            case protocol.Drain(grace_seconds=grace):
                self.stop(grace)
            case _:
                log.warning("worker %s cannot use a %s", self._name, type(message).__name__)

    async def _begin(self, welcome: protocol.Welcome) -> None:
        """Serve a Sentinel; a later one from the next batch on, since one may be running."""
        self._welcomed = True
        _check_shared(welcome)
        self._lease = welcome.lease_seconds
        self._holdings.renewed()
        if self._runner is None:
            await self._try_sandbox(welcome)
            self._runner = Runner(welcome, self._cache)
        else:
            self._welcome = welcome
            for plugin_id in [n for n, future in self._artifacts.items() if not future.done()]:
                await self._send(protocol.Fetch(plugin_id=plugin_id))
        await self._pull()

    async def _try_sandbox(self, welcome: protocol.Welcome) -> None:
        if self._alone:
            trial = partial(canary.check, welcome.limits, self._cache)
            await self._thread.run(trial)

    async def _work(self) -> None:
        """Run one assigned batch after another; end when draining and nothing is in hand."""
        draining = asyncio.create_task(self._draining.wait())
        try:
            while batch := await self._next_batch(draining):
                if not self._draining.is_set():
                    await self._pull()  # the next batch comes while this one runs
                await self._run(batch, draining)
        finally:
            draining.cancel()

    async def _next_batch(self, draining: asyncio.Task[bool]) -> list[Assignment]:
        waiting = asyncio.create_task(self._jobs.get())
        await asyncio.wait([waiting, draining], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        waiting.cancel()
        return []

    async def _run(self, batch: Sequence[Assignment], draining: asyncio.Task[bool]) -> None:
        assert self._runner is not None
        loop = asyncio.get_running_loop()
        if self._welcome:
            welcome, self._welcome = self._welcome, None
            await self._try_sandbox(welcome)
            await self._thread.run(partial(self._runner.follow, welcome))
        needed = {job.plugin_id for job in batch}
        artifacts = {n: await self._artifact(n, draining) for n in needed}
        work = [(job, found) for job in batch if (found := artifacts[job.plugin_id])]
        started = loop.time()
        receipts = await self._thread.run(partial(self._runner.run, work))
        receipts += [released(job) for job in batch if not artifacts[job.plugin_id]]
        self._holdings.conclude(receipts)
        await self._send(Conclude(receipts=receipts))
        crashpoint("worker.concluded")
        each = (loop.time() - started) / len(batch)
        self._pace = (self._pace + each) / 2

    async def _artifact(self, plugin_id: int, draining: asyncio.Task[bool]) -> Artifact | None:
        """Fetched anew for each batch: whether it may run is the Sentinel's to say, each time.

        None where we are told to leave before it comes.
        """
        while not draining.done():
            future: asyncio.Future[Artifact] = asyncio.get_running_loop().create_future()
            self._artifacts[plugin_id] = future
            await self._send(protocol.Fetch(plugin_id=plugin_id))
            awaited: list[asyncio.Future[Any]] = [future, draining]
            await asyncio.wait(awaited, timeout=FETCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
        return None

    async def _pull(self) -> None:
        free = int(PREFETCH_SECONDS / self._pace)
        await self._send(protocol.Ready(free=max(1, min(free, PREFETCH_LIMIT))))

    async def _compare(self, message: protocol.Granted) -> None:
        revoked, again = self._holdings.compare(message)
        if revoked and self._runner:
            self._runner.revoke(revoked)
        if again:
            await self._send(Conclude(receipts=again))

    async def _beat(self) -> None:
        """Say that we live; end what we hold before others may have it, if nobody hears us."""
        while True:
            pause = min(HEARTBEAT_SECONDS, self._lease / HEARTBEATS or HEARTBEAT_SECONDS)
            await asyncio.sleep(pause)
            if self._lease and self._holdings.safe_for(self._lease) <= pause:
                self._let_go()
            if not self._welcomed:  # the Hello was lost, or what was said to it
                await self._send(protocol.Hello(worker=self._name))
            await self._send(protocol.Heartbeat(sent=time.monotonic()))
            if self._runner and not self._draining.is_set() and not self._holdings.running():
                await self._pull()  # the first time it was said, it may have been lost

    def _let_go(self) -> None:
        """The lease could not be renewed: end what runs; its receipts say Released."""
        running = self._holdings.running()
        if running and self._runner:
            log.warning("worker %s lost touch with the Sentinel; its jobs are ended", self._name)
            self._runner.revoke(running)

    async def _follow(self) -> None:
        """Connect when a Sentinel has left its key, and anew when a later one has left another."""
        used: wire.CurveKeys | None = None
        self._socket.reconnect_ivl = 1_000  # slower than we look: few attempts with an old key
        while True:
            key = wire.read_key(self._endpoint)
            if key and used and key != used:
                log.info("worker %s: another Sentinel is there", self._name)
                self._socket.disconnect(self._endpoint)
                wire.connect(self._socket, self._endpoint, key)
                await self._send(protocol.Hello(worker=self._name))
            elif key and not used:
                wire.connect(self._socket, self._endpoint, key)  # the first Hello waits for this
            used = key or used
            await asyncio.sleep(KEY_SECONDS)

    async def _send(self, message: AnyMessage, flags: int = 0) -> None:
        await self._socket.send_multipart(protocol.encode(message), flags=flags)


def _check_shared(welcome: protocol.Welcome) -> None:
    """What a worker stages must be where the Sentinel looks for it."""
    folder = Path(welcome.guests_folder).parent
    try:
        shared = os.stat(folder).st_ino == welcome.inode
    except OSError:
        shared = False
    if not shared:
        raise DaemonGone(
            f"this worker does not share the Sentinel's files: {folder} is another folder here",
            "run it on the Sentinel's machine, as its user, with that folder in reach",
        )


async def serve(endpoint: str, cache: Path) -> None:
    """Run one Worker as a process of its own, until SIGTERM, SIGINT or the Sentinel's Drain.

    Raises:
        ConfigError: the endpoint is not on the loopback interface, or its key cannot be read.
        DaemonGone: this worker cannot serve that Sentinel.
    """
    wire.require_zmq()
    sandbox.shield_host()
    endpoint = wire.loopback(endpoint, "--connect tcp://localhost:5555")
    if wire.read_key(endpoint) is None:
        log.warning(
            "no Sentinel of this user listens at %s: none has left its key in %s. Waiting for one "
            "(python -m casparian_flow.main, as this user and with the same XDG_RUNTIME_DIR)",
            endpoint, wire.key_file(endpoint),
        )  # fmt: skip
    with zmq.asyncio.Context() as context:
        worker = Worker(f"{os.uname().nodename}-{os.getpid()}", context, endpoint, cache)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop, 20.0)
        log.info("worker waits for jobs from %s", endpoint)
        await worker.run()
        log.info("worker left")


def main() -> None:
    """The command line of a Worker alone."""
    import argparse

    from casparian_flow import config

    parser = argparse.ArgumentParser(prog="python -m casparian_flow.engine.worker_client")
    parser.add_argument("--connect", default="tcp://localhost:5555", help="the Sentinel's address")
    parser.add_argument("--debug", action="store_true", help="log everything")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    try:
        config.arm_crashpoints()
        asyncio.run(serve(options.connect, config.cache_folder()))
    except (CasparianError, OSError, BaseExceptionGroup) as error:
        leave(error)


if __name__ == "__main__":
    main()
