"""A Worker: pulls jobs from the Sentinel, runs them in guests, and sends a receipt for each.

In the daemon it is a task with an inproc socket. As a process of its own, started by

    python -m casparian_flow.engine.worker_client --connect tcp://localhost:5555

it waits for the Sentinel's key file (`engine.wire`). It never reads the ledger: the assignment has
everything about a job, and the output is staged on the disk that it shares with the Sentinel.
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
from casparian_flow.engine.bridge import QUIT_SECONDS
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


# The attempts that a Worker holds. Since messages may be lost, repeated or late, the Sentinel
# answers each heartbeat with the attempts that it believes the Worker to hold (`Granted`). The
# Worker ends all others, and sends again the receipts that the Sentinel seems to lack.

SEEN_LIMIT = 10_000
"""Assignments remembered, so that a late repetition does not run again."""

SAFE_SHARE = 2 / 3
"""Share of the lease after which a Worker that could not renew it ends its jobs."""


@dataclass(frozen=True)
class _Concluded:
    receipt: Receipt
    at: float


class Holdings:
    """Attempts that were assigned to a Worker and that the Sentinel has not concluded."""

    def __init__(self) -> None:
        self._held: dict[Pair, _Concluded | None] = {}
        self._seen: dict[Pair, None] = {}
        self._renewed = time.monotonic()

    def take(self, jobs: Sequence[Assignment]) -> list[Assignment]:
        """Hold these assignments; returns those that are new."""
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
        """Keep receipts until the Sentinel has them."""
        now = time.monotonic()
        for receipt in receipts:
            if (receipt.job_id, receipt.fence) in self._held:
                self._held[receipt.job_id, receipt.fence] = _Concluded(receipt, now)

    def compare(self, message: Granted) -> tuple[set[Pair], list[Receipt]]:
        """Compare with the Sentinel: the attempts to end, and the receipts to send (again).

        Receipts that are younger than the answered heartbeat are still under way.
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
        """Assigned attempts that have not ended."""
        return {pair for pair, ended in self._held.items() if ended is None}

    def renewed(self) -> None:
        """Begin a new lease, after a Welcome."""
        self._renewed = time.monotonic()

    def safe_for(self, lease_seconds: float) -> float:
        """Seconds until the attempts must be ended; 0 or less if now."""
        return self._renewed + lease_seconds * SAFE_SHARE - time.monotonic()


# One thread for all work with guests: the kernel kills a guest when the thread that started it
# ends. A call can hang for ever, for example in a filesystem. ThreadPoolExecutor would then keep
# the process from exiting, whatever the signal.

T = TypeVar("T")


class OneThread:
    """Runs one call after another; it starts with the first."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Any] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Queue a call; the future of this event loop gets its result."""
        if not self._thread.is_alive():
            self._thread.start()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, call))
        return asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the thread after the queued calls."""
        self._calls.put(None)

    def leave_behind(self) -> None:
        """At the end of the process, exit at once with `ExitCode.DAEMON` if a call still runs.

        During the interpreter's shutdown, a thread in native code could crash it.
        """
        atexit.register(self._end)

    def _end(self) -> None:
        if self._thread.is_alive():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(ExitCode.DAEMON)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001  passed to the caller
                future.set_exception(error)
            else:
                future.set_result(result)


HEARTBEAT_SECONDS = 5.0
"""Pause between heartbeats, also while a job runs; shorter if the lease is short."""

HEARTBEATS = 6
"""Smallest number of heartbeats in the time of a lease."""

KEY_SECONDS = 0.5
"""How often a Worker in its own process looks for a new key file."""

FETCH_SECONDS = 10.0
"""How long an artifact may take before it is requested again: a message may be lost."""

HUNG_SECONDS = 2.0
"""How long a killed run may take to end before the Worker leaves without it."""

CLOSE_SECONDS = 1.0
"""How long closing the guests may take beyond what one has to quit by itself; the others end with
this process."""

PREFETCH_SECONDS = 0.25
"""Seconds of work that a Worker requests ahead: many short jobs, or one long job."""

PREFETCH_LIMIT = 32


class Worker:
    """Serves one Sentinel until drained or cancelled.

    Args:
        name: unique among the Sentinel's Workers.
        context: the process's zmq context (inproc works only within one context).
        endpoint: the Sentinel's inproc address, or TCP with an IP address.
        cache: folder of the environments.
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
        """The Welcome of a new Sentinel, while the Runner still serves an earlier one."""
        self._welcomed = False
        self._pace = PREFETCH_SECONDS
        self._draining = asyncio.Event()
        self._hung = asyncio.Event()

    async def run(self) -> None:
        """Send Hello, then serve until the Sentinel sends Drain.

        Raises:
            DaemonGone: this Worker cannot serve that Sentinel; the message says why.
            ConfigError: the Sentinel's key cannot be read, or its folder is not private.
            SandboxUnavailable: the sandbox is required, and can be broken here.
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
        """Whether the Sentinel is in another process: then the sandbox is not tested yet."""
        return not self._endpoint.startswith("inproc:")

    def stop(self, grace_seconds: float) -> None:
        """Take no further job; kill the running one if it does not finish within the grace."""
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
            quitting = 0.0 if self._hung.is_set() else QUIT_SECONDS
            done, _ = await asyncio.wait([closing], timeout=quitting + CLOSE_SECONDS)
            if not done:
                log.error("worker %s hangs in a call and is abandoned; its jobs go back to the "
                    "queue", self._name)  # fmt: skip
                self._thread.leave_behind()
        self._thread.stop()
        with contextlib.suppress(zmq.ZMQError):
            await self._send(protocol.Goodbye(), flags=zmq.NOBLOCK)
        self._socket.close()

    async def _wait_in_vain(self) -> None:
        """Return when a killed run hangs, so that the Worker leaves without it."""
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
                log.warning("worker %s ignored a %s message", self._name, type(message).__name__)

    async def _begin(self, welcome: protocol.Welcome) -> None:
        """Serve the Sentinel of a Welcome; a later one from the next batch on."""
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
        """Run one assigned batch after another; return when draining and none is left."""
        draining = asyncio.create_task(self._draining.wait())
        try:
            while batch := await self._next_batch(draining):
                if not self._draining.is_set():
                    await self._pull()  # request the next batch while this one runs
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
        work = [(job, artifact) for job in batch if (artifact := artifacts[job.plugin_id])]
        started = loop.time()
        receipts = await self._thread.run(partial(self._runner.run, work))
        receipts += [released(job) for job in batch if not artifacts[job.plugin_id]]
        self._holdings.conclude(receipts)
        await self._send(Conclude(receipts=receipts))
        crashpoint("worker.concluded")
        seconds_each = (loop.time() - started) / len(batch)
        self._pace = (self._pace + seconds_each) / 2

    async def _artifact(self, plugin_id: int, draining: asyncio.Task[bool]) -> Artifact | None:
        """Fetch an artifact, for each batch anew, since the Sentinel decides whether it may run.

        None if draining begins before it arrives.
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
        """Send heartbeats; end the attempts if the lease could not be renewed."""
        while True:
            pause = min(HEARTBEAT_SECONDS, self._lease / HEARTBEATS or HEARTBEAT_SECONDS)
            await asyncio.sleep(pause)
            if self._lease and self._holdings.safe_for(self._lease) <= pause:
                self._let_go()
            if not self._welcomed:  # the Hello or the Welcome was lost
                await self._send(protocol.Hello(worker=self._name))
            await self._send(protocol.Heartbeat(sent=time.monotonic()))
            if self._runner and not self._draining.is_set() and not self._holdings.running():
                await self._pull()  # the earlier Ready may be lost

    def _let_go(self) -> None:
        """End all attempts, since the lease could not be renewed; their receipts are RELEASED."""
        running = self._holdings.running()
        if running and self._runner:
            log.warning(
                "worker %s lost the connection to the Sentinel and ends its jobs", self._name
            )
            self._runner.revoke(running)

    async def _follow(self) -> None:
        """Connect when there is a key file, and again when a new Sentinel has replaced it."""
        used: wire.CurveKeys | None = None
        self._socket.reconnect_ivl = 1_000  # slower than KEY_SECONDS: few attempts with an old key
        while True:
            key = wire.read_key(self._endpoint)
            if key and used and key != used:
                log.info("worker %s: a new Sentinel has started", self._name)
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
    """Raise DaemonGone unless this Worker sees the Sentinel's files."""
    folder = Path(welcome.guests_folder).parent
    try:
        shared = os.stat(folder).st_ino == welcome.inode
    except OSError:
        shared = False
    if not shared:
        raise DaemonGone(
            f"this worker does not see the Sentinel's files: {folder} is a different folder here",
            "run it on the Sentinel's machine, as its user, with access to that folder",
        )


async def serve(endpoint: str, cache: Path) -> None:
    """Run one Worker in this process until SIGTERM, SIGINT or the Sentinel's Drain.

    Raises:
        ConfigError: the endpoint is not on the loopback interface, or its key cannot be read.
        DaemonGone: this Worker cannot serve that Sentinel.
    """
    wire.require_zmq()
    sandbox.shield_host()
    endpoint = wire.loopback(endpoint, "--connect tcp://localhost:5555")
    if wire.read_key(endpoint) is None:
        log.warning(
            "waiting for a Sentinel at %s: there is no key in %s yet (start python -m "
            "casparian_flow.main as this user and with the same XDG_RUNTIME_DIR)",
            endpoint, wire.key_file(endpoint),
        )  # fmt: skip
    with zmq.asyncio.Context() as context:
        worker = Worker(f"{os.uname().nodename}-{os.getpid()}", context, endpoint, cache)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop, 20.0)
        log.info("worker is waiting for jobs from %s", endpoint)
        await worker.run()
        log.info("worker stopped")


def main() -> None:
    """Command line of a Worker in its own process."""
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
