"""The host's side of a guest: start it, send it jobs, and check everything it sends.

Blocking code for a Worker's long-lived thread: the kernel kills the guest when the thread that
started it ends. Everything on the wire is untrusted: its size is bounded before it is read, its
content is checked before it is used, and a breach of the protocol kills the guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import re
import selectors
import signal
import socket
import struct
import termios
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar

import msgspec
import pyarrow as pa

from casparian_flow.config import GuestSettings
from casparian_flow.engine.batches import ReceivedTopic, TopicEnd
from casparian_flow.engine.frames import CONTROL_LIMIT, HEADER, TOPIC_LENGTH, FrameKind, pack
from casparian_flow.engine.guest_process import (
    WATCH,
    Meter,
    confinement,
    kill_below,
    kill_tree,
    spawn,
)
from casparian_flow.errors import (
    GuestDied,
    Held,
    JobError,
    OutOfMemory,
    OutputRefused,
    PluginFailed,
    PluginTimeout,
    ProtocolError,
    Unavailable,
)
from casparian_flow.protocol import Artifact, Evidence, Record
from casparian_flow.sdk import FileInfo
from casparian_flow.security.sandbox import LAYERS, THREADS, InPlace

QUIT_SECONDS = 2.0
"""How long a guest may take to quit; it has nothing to save."""
READ_AHEAD = 64 << 10
"""Bytes read from the wire at once, so that a small job needs one system call."""
PAID_BYTES = 1 << 20
"""Bytes received that allow the host a second of processor time; the slowest sinks need a tenth of
it. More is charged to the guest, since few bytes can unfold to many."""
T = TypeVar("T")


class Guest:
    """A process that runs one plugin over one file after another.

    Call `load` once, `run` for each file, and `close` at the end (or use it in a `with`). The guest
    can run the next file after PluginFailed, OutputRefused or Held; any other error kills it and
    its children.

    Args:
        python: the interpreter of the plugin's environment.
        site_packages: the folder of that environment's packages.
        artifact: the verified plugin.
        folder: the guest's home. It must exist and contain `in` (inbox) and `tmp` (scratch).
        bundle: the folder that `environments.bundle` returned.
        limits: upper limits of any guest; the artifact may ask for less.
        in_place: a large file that it may read besides its packages and its inbox.

    Raises:
        Unavailable: the process cannot be started.
    """

    def __init__(
        self,
        python: Path,
        site_packages: Path,
        artifact: Artifact,
        *,
        folder: Path,
        bundle: Path,
        limits: GuestSettings,
        in_place: InPlace | None = None,
    ) -> None:
        self.jobs_served = 0
        self.sandbox = ""
        """Active layers, once it is loaded: `limits, namespaces, landlock, seccomp`."""
        self.compiled_anew: list[str] = []
        """Source files that it imported in the last job and that have no byte code."""
        self.ends: dict[str, TopicEnd] = {}
        """Topic -> totals of the last successful job; empty while a job runs or after it failed."""
        self._artifact = artifact
        self._who = f"plugin {artifact.name} {artifact.version}"
        self._limits = limits
        self._confinement = confinement(
            artifact, limits, folder, [str(site_packages), str(bundle)], in_place
        )
        self._log = JobLog()
        self._received: dict[str, ReceivedTopic] = {}
        self._idle = False
        self._ahead = bytearray()
        self._deadline = 0.0
        self._paid = 0.0
        """Unused seconds of host processor time that the current job's bytes allow."""
        self._crowded = False
        """Whether it was killed for starting too many threads."""
        script = bundle / "casparian_flow" / "engine" / "guest.py"
        with contextlib.ExitStack() as undo:
            try:
                self._selector = undo.enter_context(selectors.DefaultSelector())
                self._wire, theirs = map(undo.enter_context, socket.socketpair())
                self._process = spawn(python, script, theirs, site_packages, self._confinement)
            except OSError as error:
                raise Unavailable(f"cannot start {self._who} with {python}: {error}") from error
            theirs.close()
            undo.pop_all()
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        self._meter = Meter(self._process)
        self._selector.register(self._wire, selectors.EVENT_READ)
        self._selector.register(self._pipe, selectors.EVENT_READ)

    def load(self, timeout_seconds: float = 60.0) -> None:
        """Send the plugin and wait until it is imported; a failure kills the guest.

        Raises:
            PluginFailed, OutOfMemory: importing the plugin raised.
            OutputRefused: the plugin has no Handler.
            Unavailable: the sandbox lacks a required layer; no code of the plugin or its packages
                has run.
            PluginTimeout, GuestDied: as `run`.
        """
        artifact = self._artifact
        head = {
            "name": artifact.name,
            "version": artifact.version,
            "topics": artifact.topics,
            "batch_limit": self._limits.batch_limit_bytes,
            "scratch": self._confinement.scratch if self._confinement.scratch_bytes else "",
        }
        try:
            with self._exchange(timeout_seconds, math.inf, loading=True):
                self._expect_locked()
                line = json.dumps(head).encode() + b"\n"
                self._wire.sendall(pack(FrameKind.LOAD, 0, line + artifact.source))
                kind, length = self._header(job=0)
                if kind == FrameKind.FAILED:
                    raise self._failure(length)
                if kind != FrameKind.READY:
                    raise ProtocolError(f"got {kind.name} instead of READY")
                self.compiled_anew = self._record(length, list[str])
        except JobError:
            self.kill()
            raise

    def run(
        self, file: FileInfo, timeout_seconds: float
    ) -> Generator[tuple[str, pa.RecordBatch], None, None]:
        """Run the plugin over one file and yield its output: (topic, checked batch).

        The guest runs ahead of the caller only by the socket's buffer. Closing the generator early
        kills the guest. The output is complete only when the generator is exhausted; `ends` then
        has the totals.

        Args:
            file: the plugin's `self.file`.
            timeout_seconds: wall clock limit of the run, without the time of the caller between two
                batches, except processor time that exceeds PAID_BYTES.

        Raises:
            PluginFailed, OutOfMemory: the plugin raised; the traceback is in the log.
            Held: the plugin holds the version back for a person to decide.
            OutputRefused: the plugin published something that is not a table or does not fit the
                topic.
            PluginTimeout: the run exceeded its time and was killed.
            GuestDied: the process ended or broke the protocol.
        """
        self.ends = {}
        self.jobs_served += 1
        with self._exchange(timeout_seconds, self._limits.cpu_seconds):
            request = json.dumps(dataclasses.asdict(file)).encode()
            self._wire.sendall(pack(FrameKind.RUN, file.job_id, request))
            self.ends = yield from self._stream(file.job_id)

    @property
    def seconds_left(self) -> float:
        """Seconds left of the time limit of the last job (or of loading)."""
        return max(0.0, self._deadline - time.monotonic())

    def take_log(self) -> str:
        """The plugin's prints since the last call, and the traceback of a failed job."""
        log, self._log = self._log, JobLog()
        return log.text()

    @property
    def evidence(self) -> Evidence:
        """Measurements of the last job (or of loading)."""
        ends = [topic.end() for topic in self._received.values()]
        return self._meter.evidence(sum(e.batches for e in ends), sum(e.rows for e in ends))

    def _expect_locked(self) -> None:
        """Read the guest's report on its sandbox; only our code has run in it so far."""
        kind, length = self._header(job=0)
        if kind != FrameKind.LOCKED:
            raise ProtocolError(f"got {kind.name} instead of LOCKED")
        report = self._record(length, Locked)
        self.sandbox = ", ".join(report.layers) or "off"
        lacking = {name: why for name, why in report.missing.items() if name in LAYERS}
        if lacking and self._limits.sandbox == "required":
            reasons = "; ".join(f"no {name}: {why}" for name, why in lacking.items())
            raise Unavailable(f"the sandbox is incomplete on this machine: {reasons}")

    @property
    def alive(self) -> bool:
        """Whether it can run another job. The wire of a dead guest is readable, as it is closed."""
        if not self._idle or self._ahead:
            return False
        return all(key.fileobj is not self._wire for key, _ in self._selector.select(0))

    def interrupt(self) -> None:
        """From another thread: end the current run, whose thread gets GuestDied."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ask the guest to quit, and kill it if it does not; may be called twice."""
        if self.alive:
            self._deadline = time.monotonic() + QUIT_SECONDS
            kill_below(self._process.pid)
            self._signal(signal.SIGCONT)
            with contextlib.suppress(OSError):
                self._wire.settimeout(QUIT_SECONDS)  # the guest may not read
                self._wire.sendall(pack(FrameKind.QUIT, 0))
                self._await_wire()
        self.kill()

    def kill(self) -> None:
        """Kill the guest and all its descendants, and free its resources."""
        self._idle = False
        if self._process.returncode is not None:
            return
        WATCH.unwatch(self._process.pid)
        kill_tree(self._process.pid)
        self._meter.reap()
        self._drain()
        self._selector.close()
        self._pipe.close()
        self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _exchange(
        self, timeout_seconds: float, cpu_seconds: float, *, loading: bool = False
    ) -> Iterator[None]:
        """One request and its complete response; any other end of the block kills the guest."""
        self._idle = False
        self._received = {}
        self._paid = 0.0
        self._deadline = time.monotonic() + timeout_seconds
        self._meter.start(cpu_seconds)
        if self._process.returncode is None:
            WATCH.watch(self._process.pid, self._crowd)
        self._signal(signal.SIGCONT)
        try:
            self._wire.settimeout(timeout_seconds)
            yield
        except (PluginFailed, OutputRefused, Held):
            if self._process.returncode is None:
                self._finish()
            raise
        except TimeoutError as error:
            spent = self._meter.left() <= 0
            self.kill()
            if spent:
                raise outspent(self._who, cpu_seconds) from error
            raise outran(self._who, timeout_seconds, loading) from error
        except OSError as error:
            by_itself = self._meter.has_ended()
            self.kill()
            if self._crowded:
                what = f"{self._who} started more than {THREADS} threads"
                raise GuestDied(
                    f"{what} and was killed", "start fewer threads in the plugin"
                ) from error
            raise self._meter.cause(self._who, by_itself) from error
        except ProtocolError as error:
            self.kill()
            what = f"the process of {self._who} sent an invalid message: {error}"
            raise GuestDied(what, "see the job's log for what the plugin printed") from error
        except BaseException:
            self.kill()
            raise
        else:
            self._finish()

    def _signal(self, number: int) -> None:
        # Popen.send_signal may reap the process, and its pid could then be reused.
        if self._process.returncode is None:
            os.kill(self._process.pid, number)

    def _crowd(self) -> None:
        self._crowded = True

    def _finish(self) -> None:
        """Stop the process until its next job: threads that it left running must not go on."""
        WATCH.unwatch(self._process.pid)
        self._signal(signal.SIGSTOP)
        self._drain()
        self._idle = True

    def _stream(self, job: int) -> Generator[tuple[str, pa.RecordBatch], None, dict[str, TopicEnd]]:
        received = self._received
        ends: dict[str, TopicEnd] = {}
        received_bytes = 0
        while True:
            kind, length = self._header(job)
            if kind == FrameKind.BATCH:
                self._within_output(received_bytes + length)
                topic, data = self._batch(length)
                if topic in ends or topic not in self._artifact.topics:
                    raise ProtocolError(f"a batch for topic {topic!r}, which is not declared")
                counts = received.setdefault(topic, ReceivedTopic(topic))
                batch, unfolded = counts.add(data, self._limits.batch_limit_bytes)
                received_bytes += max(length, unfolded)
                self._within_output(received_bytes)
                with self._worked(length):
                    yield topic, batch
            elif kind == FrameKind.END:
                end = self._record(length, TopicEnd)
                if end.topic not in received or end != received[end.topic].end():
                    raise ProtocolError(
                        f"the END of topic {end.topic!r} does not match what was received"
                    )
                ends[end.topic] = end
            elif kind == FrameKind.FAILED:
                raise self._failure(length)
            elif kind == FrameKind.DONE and ends.keys() == received.keys():
                if length:
                    self.compiled_anew = self._record(length, list[str])
                return ends
            else:
                raise ProtocolError(f"an unexpected {kind.name}")

    def _within_output(self, received_bytes: int) -> None:
        """Kill the guest if its output, unfolded, exceeds the limit."""
        limit = self._limits.output_limit_bytes
        if received_bytes > limit:
            self.kill()
            what = f"{self._who} published more than {limit} bytes for one file"
            raise OutputRefused(what, "raise output_limit_bytes under [guest]")

    @contextlib.contextmanager
    def _worked(self, length: int) -> Iterator[None]:
        """Extend the guest's deadline by the caller's time for a batch of `length` bytes.

        A slow disk or sink does not count against the guest, but processor time beyond PAID_BYTES
        does.
        """
        began, computed = time.monotonic(), time.thread_time()
        yield
        computed = time.thread_time() - computed
        self._paid += length / PAID_BYTES
        unpaid = max(0.0, computed - self._paid)
        self._paid = max(0.0, self._paid - computed)
        self._meter.charge(unpaid)
        self._deadline += time.monotonic() - began - unpaid

    def _batch(self, length: int) -> tuple[str, pa.Buffer]:
        (name_length,) = TOPIC_LENGTH.unpack(self._read(TOPIC_LENGTH.size))
        rest = length - TOPIC_LENGTH.size - name_length
        if rest < 0:
            raise ProtocolError("a batch shorter than its topic's name")
        topic = self._read(name_length).to_pybytes().decode(errors="replace")
        return topic, self._read(rest)  # read separately, to be aligned for Arrow

    def _failure(self, length: int) -> JobError:
        failure = self._record(length, Failure)
        self._drain()
        self._log.write(failure.traceback.encode())
        return failure.error(self._who, self._confinement.memory_bytes)

    def _record(self, length: int, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._read(length), type=kind)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ProtocolError(f"a malformed {kind.__name__}: {error}") from error

    def _header(self, job: int) -> tuple[FrameKind, int]:
        # _read checks the deadline only when it waits, and data read ahead needs no wait.
        if self._deadline <= time.monotonic():
            raise TimeoutError
        number, its_job, length = HEADER.unpack(self._read(HEADER.size))
        try:
            kind = FrameKind(number)
        except ValueError:
            raise ProtocolError(f"a frame of unknown kind {number}") from None
        limit = self._limits.batch_limit_bytes if kind == FrameKind.BATCH else CONTROL_LIMIT
        if length > limit:
            raise ProtocolError(f"a {kind.name} of {length} bytes; the limit is {limit}")
        if its_job != job:
            raise ProtocolError(f"a {kind.name} of job {its_job} while job {job} runs")
        return kind, length

    def _read(self, length: int) -> pa.Buffer:
        """Read exactly `length` bytes; keep what was read ahead for the next call."""
        while len(self._ahead) < length <= READ_AHEAD:
            self._await_wire()
            data = self._wire.recv(READ_AHEAD)
            if not data:
                raise ConnectionResetError("the plugin's process closed the connection")
            self._ahead += data
        buffer = pa.allocate_buffer(length)
        rest = memoryview(buffer).cast("B")
        taken = min(length, len(self._ahead))
        rest[:taken] = self._ahead[:taken]
        del self._ahead[:taken]
        rest = rest[taken:]
        while rest:
            self._await_wire()
            count = self._wire.recv_into(rest)
            if not count:
                raise ConnectionResetError("the plugin's process closed the connection")
            rest = rest[count:]
        return buffer

    def _await_wire(self) -> None:
        """Wait until the wire is readable, and meanwhile empty the pipe of its prints."""
        while (remaining := min(self._deadline - time.monotonic(), self._meter.left())) > 0:
            ready = {key.fileobj for key, _ in self._selector.select(remaining)}
            if self._pipe in ready and not self._drain():
                self._selector.unregister(self._pipe)  # the plugin closed its standard streams
            if self._wire in ready:
                return
        raise TimeoutError

    def _drain(self) -> int:
        """Read what is in the pipe now, and not more: a plugin may print without end."""
        waiting = struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, b"\0" * 4))[0]
        if waiting:
            self._log.write(os.read(self._pipe.fileno(), waiting))
        return int(waiting)


# Messages of a guest.

MESSAGE_LIMIT = 2_000
"""Characters of a guest's error message that are kept, in the job, its attempt and the audit."""


class Failure(Record, frozen=True):
    """A guest's FAILED: an attempt that ended without output."""

    kind: Literal["refused", "exception", "held"]
    message: str
    traceback: str

    def error(self, who: str, memory_bytes: int) -> JobError:
        """The error for the job.

        Args:
            who: the plugin's name and version, for the message.
            memory_bytes: the guest's memory limit.
        """
        message = self.message
        if len(message) > MESSAGE_LIMIT:
            message = f"{message[:MESSAGE_LIMIT]}... ({len(message)} characters)"
        if self.kind == "held":  # no other failure's words begin so
            return Held(f"held: {message.removeprefix('held: ')}", "casparian jobs --held")
        if self.kind == "refused":
            return OutputRefused(
                f"{who}: {message}", "fix the plugin and publish it under a new version"
            )
        if "MemoryError" in message.partition(":")[0]:
            limit = f"the limit is {memory_bytes >> 20} MiB (memory_bytes under [guest])"
            return OutOfMemory(f"{who} ran out of memory: {message}; {limit}")
        return PluginFailed(f"{who}: {message}", "the traceback is in the job's log")


class Locked(Record, frozen=True):
    """A guest's LOCKED: its sandbox's layers, sent before any foreign code has run."""

    layers: list[str]
    missing: dict[str, str]
    """Layer -> why it is missing."""


def outspent(who: str, seconds: float) -> PluginTimeout:
    what = f"{who} ran longer than {seconds:g} s of processor time and was killed"
    return PluginTimeout(what, "raise cpu_seconds under [guest]")


def outran(who: str, seconds: float, loading: bool) -> PluginTimeout:
    if loading:
        what = f"{who} took longer than {seconds:g} s to be imported and was killed"
        return PluginTimeout(what, "move work from the module's top level into execute")
    what = f"{who} ran longer than {seconds:g} s and was killed"
    return PluginTimeout(what, "raise timeout_seconds under [jobs]")


# The log of one job.

HEAD = 16 << 10
TAIL = 48 << 10
"""Bytes kept of the log's beginning and of its end."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, except newline and tab."""


class JobLog:
    """The first HEAD and the last TAIL bytes of a plugin's prints."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def write(self, data: bytes) -> None:
        """Append, dropping bytes from the middle."""
        room = HEAD - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        surplus = max(len(self._tail) - TAIL, 0)
        del self._tail[:surplus]
        self._left_out += surplus

    def text(self) -> str:
        """The kept bytes as text, with control characters escaped."""
        gap = f"\n[{self._left_out} bytes left out]\n".encode() if self._left_out else b""
        text = (self._head + gap + self._tail).decode(errors="replace")
        return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
