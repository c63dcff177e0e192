"""The host's side of a guest: start it, feed it jobs, believe nothing it says.

Blocking code for a worker's own long-lived thread: the kernel kills the guest when the thread
that started it ends. Everything read from the wire is bounded before it is read and checked
before it is used; what breaks the protocol kills the guest.
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
"""How long a guest may take to leave when asked; it has no work to save."""
READ_AHEAD = 64 << 10
"""Bytes taken from the wire at once: a small job is one system call."""
PAID_BYTES = 1 << 20
"""Bytes on the wire that pay for a second of our processor: the dearest sinks need a tenth of it.
What a batch costs beyond is the guest's own time: few bytes can be much to unfold."""
T = TypeVar("T")


class Guest:
    """A process that runs one plugin over one file after another.

    Call `load` once, `run` for each file, `close` at last (or use it in a `with`). It serves on
    after a PluginFailed or OutputRefused; any other error has killed it and its children.

    Args:
        python: the interpreter of the plugin's environment.
        site_packages: where that environment's packages are.
        artifact: the plugin, verified.
        folder: the guest's own folder: its home. It must exist, with `in` (its inbox) and `tmp`
            (its scratch folder) in it.
        bundle: what `bundle()` returned.
        limits: what any guest may have at most; the artifact may ask for less.
        in_place: a large file it may read besides its packages and its inbox.

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
        """What holds it, once it is loaded: `limits, namespaces, landlock, seccomp`."""
        self.compiled_anew: list[str] = []
        """Source files that it imported lately and that have no byte code."""
        self.ends: dict[str, TopicEnd] = {}
        """Per topic, what the last successful job sent; empty while a job runs or has failed."""
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
        """Seconds of our processor that what the current job sent has paid for, and not used up."""
        self._crowded = False
        """Whether it was killed for its threads."""
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
        """Send the plugin and wait until it is imported; the guest is dead if that fails.

        Raises:
            PluginFailed, OutOfMemory: importing it raised.
            OutputRefused: it has no Handler.
            Unavailable: the sandbox is not what the configuration requires; no code of the plugin
                or its packages has run.
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
                    raise ProtocolError(f"{kind.name} where READY was due")
                self.compiled_anew = self._record(length, list[str])
        except JobError:
            self.kill()
            raise

    def run(
        self, file: FileInfo, timeout_seconds: float
    ) -> Generator[tuple[str, pa.RecordBatch], None, None]:
        """Run the plugin over one file and yield what it publishes: (topic, checked batch).

        The guest works only as far ahead as the socket's buffer. A generator that is closed
        before its end kills the guest; only when it is exhausted is the output whole, and `ends`
        says what was sent.

        Args:
            file: what the plugin sees as `self.file`.
            timeout_seconds: wall clock of the whole run, without the caller's own work; but what
                the caller computes counts as far as the bytes sent do not pay for it.

        Raises:
            PluginFailed, OutOfMemory: the plugin raised; the traceback is in the log.
            OutputRefused: what it published is no table, or not one the topic can take.
            PluginTimeout: it outran the time and was killed.
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
        """What is left of the time of its last job, or of its loading, for work that it causes."""
        return max(0.0, self._deadline - time.monotonic())

    def take_log(self) -> str:
        """What the plugin printed since the last call, and the traceback of a failed job."""
        log, self._log = self._log, JobLog()
        return log.text()

    @property
    def evidence(self) -> Evidence:
        """What is known of its last job, or of its loading, besides what it printed."""
        ends = [topic.end() for topic in self._received.values()]
        return self._meter.evidence(sum(e.batches for e in ends), sum(e.rows for e in ends))

    def _expect_locked(self) -> None:
        """The guest's word on its sandbox; believed, since only our code can have spoken."""
        kind, length = self._header(job=0)
        if kind != FrameKind.LOCKED:
            raise ProtocolError(f"{kind.name} where LOCKED was due")
        said = self._record(length, Locked)
        self.sandbox = ", ".join(said.layers) or "off"
        lacking = {name: why for name, why in said.missing.items() if name in LAYERS}
        if lacking and self._limits.sandbox == "required":
            words = "; ".join(f"no {name}: {why}" for name, why in lacking.items())
            raise Unavailable(f"the guest sandbox is not whole: {words}")

    @property
    def alive(self) -> bool:
        """Whether it can run another job: a waiting guest is silent, a dead one's wire is not."""
        if not self._idle or self._ahead:
            return False
        return all(key.fileobj is not self._wire for key, _ in self._selector.select(0))

    def interrupt(self) -> None:
        """From another thread: end what runs; the thread that runs it sees GuestDied and kills."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ask the guest to leave, and kill it if it does not; may be called twice."""
        if self.alive:
            self._deadline = time.monotonic() + QUIT_SECONDS
            kill_below(self._process.pid)
            self._signal(signal.SIGCONT)
            with contextlib.suppress(OSError):
                self._wire.settimeout(QUIT_SECONDS)  # it may have read nothing of what we sent
                self._wire.sendall(pack(FrameKind.QUIT, 0))
                self._await_wire()
        self.kill()

    def kill(self) -> None:
        """End the guest and every process below it now, and let go of all it held."""
        self._idle = False
        if self._process.returncode is not None:
            return
        WATCH.forget(self._process.pid)
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
        """A question and its whole answer; whatever cuts it short kills the guest."""
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
        except (PluginFailed, OutputRefused):
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
                what = f"the guest of {self._who} started more than {THREADS} threads"
                raise GuestDied(f"{what} and was killed", "start fewer in the plugin") from error
            raise self._meter.cause(self._who, by_itself) from error
        except ProtocolError as error:
            self.kill()
            what = f"the guest of {self._who} broke the protocol: {error}"
            raise GuestDied(what, "see the job's log for what the plugin printed") from error
        except BaseException:
            self.kill()
            raise
        else:
            self._finish()

    def _signal(self, number: int) -> None:
        # Not Popen.send_signal, which could wait for the process, and free its number for others.
        if self._process.returncode is None:
            os.kill(self._process.pid, number)

    def _crowd(self) -> None:
        self._crowded = True

    def _finish(self) -> None:
        """Stop the guest until its next job: a thread it left behind works on nobody's account."""
        WATCH.forget(self._process.pid)
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
                    raise ProtocolError(f"a batch for topic {topic!r}, which is not open to it")
                counts = received.setdefault(topic, ReceivedTopic(topic))
                batch, unfolded = counts.add(data, self._limits.batch_limit_bytes)
                received_bytes += max(length, unfolded)
                self._within_output(received_bytes)
                with self._worked(length):
                    yield topic, batch
            elif kind == FrameKind.END:
                end = self._record(length, TopicEnd)
                if end.topic not in received or end != received[end.topic].end():
                    raise ProtocolError(f"the END of topic {end.topic!r} is not what was received")
                ends[end.topic] = end
            elif kind == FrameKind.FAILED:
                raise self._failure(length)
            elif kind == FrameKind.DONE and ends.keys() == received.keys():
                if length:
                    self.compiled_anew = self._record(length, list[str])
                return ends
            else:
                raise ProtocolError(f"{kind.name} where it was not due")

    def _within_output(self, received_bytes: int) -> None:
        """Go on, or kill the guest: it has sent what it may, counted as what it unfolds to."""
        limit = self._limits.output_limit_bytes
        if received_bytes > limit:
            self.kill()
            what = f"{self._who} published more than {limit} bytes for one file"
            raise OutputRefused(what, "raise output_limit_bytes under [guest]")

    @contextlib.contextmanager
    def _worked(self, length: int) -> Iterator[None]:
        """While the caller works on a batch of so many bytes, the guest's clocks stand still: a
        slow disk or sink is not its fault. But they go on while we compute, as far as its bytes do
        not pay for that.
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
        return topic, self._read(rest)  # read apart, so that Arrow finds its data aligned

    def _failure(self, length: int) -> JobError:
        failure = self._record(length, Failure)
        self._drain()
        self._log.write(failure.traceback.encode())
        return failure.error(self._who, self._confinement.memory_bytes)

    def _record(self, length: int, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._read(length), type=kind)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ProtocolError(f"a {kind.__name__} that does not fit: {error}") from error

    def _header(self, job: int) -> tuple[FrameKind, int]:
        # What was read ahead could keep us at work without ever waiting for the wire again.
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
        """Exactly so many bytes; what one system call brings beyond them waits for the next."""
        while len(self._ahead) < length <= READ_AHEAD:
            self._await_wire()
            data = self._wire.recv(READ_AHEAD)
            if not data:
                raise ConnectionResetError("the guest closed the wire")
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
                raise ConnectionResetError("the guest closed the wire")
            rest = rest[count:]
        return buffer

    def _await_wire(self) -> None:
        """Wait for the guest to speak; keep emptying the pipe it prints to meanwhile."""
        while (remaining := min(self._deadline - time.monotonic(), self._meter.left())) > 0:
            ready = {key.fileobj for key, _ in self._selector.select(remaining)}
            if self._pipe in ready and not self._drain():
                self._selector.unregister(self._pipe)  # the plugin closed its standard streams
            if self._wire in ready:
                return
        raise TimeoutError

    def _drain(self) -> int:
        """Take what is in the pipe now, and no more: a plugin may print for ever."""
        waiting = struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, b"\0" * 4))[0]
        if waiting:
            self._log.write(os.read(self._pipe.fileno(), waiting))
        return int(waiting)


# What a guest says of itself, as the host reads it: checked, and not believed further.


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


# What a plugin prints in one job, kept within bounds and safe to show.


HEAD = 16 << 10
TAIL = 48 << 10
"""Bytes kept: how it began, and above all how it ended."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that move a terminal's cursor or worse; newline and tab are not among them."""


class JobLog:
    """What a plugin printed, bounded: the first HEAD and the last TAIL bytes."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def write(self, data: bytes) -> None:
        """Append, forgetting the middle."""
        room = HEAD - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        surplus = max(len(self._tail) - TAIL, 0)
        del self._tail[:surplus]
        self._left_out += surplus

    def text(self) -> str:
        """All that was kept, safe to show on a terminal."""
        gap = f"\n[{self._left_out} bytes left out]\n".encode() if self._left_out else b""
        text = (self._head + gap + self._tail).decode(errors="replace")
        return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
