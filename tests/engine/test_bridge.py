"""No plugin harms the host: guests that die, lie, linger or flood. Real processes only."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from casparian_flow.config import GuestSettings
from casparian_flow.engine import bridge
from casparian_flow.engine.bridge import Failure, Guest
from casparian_flow.engine.environments import BUNDLED, bundle
from casparian_flow.errors import (
    GuestDied,
    Held,
    JobError,
    OutputRefused,
    PluginFailed,
    PluginTimeout,
    Unavailable,
)
from tests.engine.guests import SECONDS, Start, artifact, file_info, loaded, plugin, run

RAW_BATCH = """
import __main__
from casparian_flow.engine.frames import HEADER, TOPIC_LENGTH, FrameKind, pack
wire, job = __main__.WIRE, self.file.job_id
def stream(*batches, compression=None):
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches: writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
def send(data, topic=b"t"):
    head = TOPIC_LENGTH.pack(len(topic)) + topic
    wire.sendall(HEADER.pack(FrameKind.BATCH, job, len(head) + len(data)) + head + data)
def end(**changes):
    wire.sendall(pack(FrameKind.END, job, json.dumps(changes).encode()))
numbers = pa.record_batch({"n": list(range(1000))})
words = pa.record_batch({"w": ["alpha", "beta"] * 500})
"""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV"),
        ("os.abort()", "was killed by SIGABRT"),
        ("self.publish('t', pa.table({'n': [1]})); os._exit(0)", "ended with exit status 0"),
        ("import __main__; __main__.WIRE.sendall(b'\\x11'); os._exit(1)", "exit status 1"),
        ("import __main__; os.close(__main__.WIRE.fileno())", "exit status|closed"),
        ("import __main__; os.dup2(1, __main__.WIRE.fileno())", "exit status|closed"),
        ("import __main__; os.dup2(__main__.WIRE.fileno(), 1); print('x' * 9999)", "unknown kind"),
    ],
)
def test_a_guest_that_dies(start: Start, body: str, words: str) -> None:
    guest = loaded(start, body)
    with pytest.raises(GuestDied, match=words):
        run(guest)
    assert not guest.alive


def test_a_crash_leaves_the_line_it_happened_on_in_the_log(start: Start) -> None:
    guest = loaded(start, "print('so far')\nimport ctypes; ctypes.string_at(0)")
    with pytest.raises(GuestDied):
        run(guest)
    log = guest.take_log()
    assert "so far" in log
    assert "Segmentation fault" in log
    assert 'File "demo.py"' in log


@pytest.mark.parametrize(
    ("breach", "words"),
    [
        ("wire.sendall(b'garbage' * 100)", "unknown kind"),
        ("wire.sendall(pack(FrameKind.DONE, job + 1))", "DONE of job 8 while job 7 runs"),
        ("wire.sendall(pack(FrameKind.READY, job))", "READY"),
        (
            "wire.sendall(HEADER.pack(FrameKind.BATCH, job, 1 << 40))",
            "BATCH of 1099511627776 bytes",
        ),
        ("wire.sendall(HEADER.pack(FrameKind.FAILED, job, 1 << 30))", "FAILED of 1073741824 bytes"),
        ("wire.sendall(pack(FrameKind.FAILED, job, b'{}'))", "malformed"),
        ("wire.sendall(pack(FrameKind.BATCH, job, b'\\xff\\xff'))", "shorter than its topic"),
        ("send(stream(numbers), b'other')", "'other'"),
        ("send(stream(numbers), b't\\xff')", "topic"),
        (
            "send(stream(numbers)); wire.sendall(pack(FrameKind.DONE, job))",
            "DONE",
        ),
        (
            "send(stream(numbers)); end(topic='t', batches=1, rows=999, digest='')",
            "END of topic 't'",
        ),
        ("end(topic='t', batches=0, rows=0, digest='')", "END of topic 't'"),
        ("send(stream(numbers)); send(stream(words))", "columns of topic 't' changed"),
        ("send(stream(numbers, compression='zstd'))", "a compressed batch"),
        ("send(stream(numbers, compression='lz4'))", "a compressed batch"),
        (
            "d = pa.array(['x' * 9999] * 3).dictionary_encode()\n"
            "send(stream(pa.record_batch({'d': d}), compression='zstd'))",
            "a dictionary column",
        ),
        ("send(stream(numbers, numbers))", "a stream of 2 batches"),
        ("send(b'')", "a stream of 0 batches"),
        ("send(os.urandom(4096))", "invalid Arrow data"),
        ("send(stream(numbers)[:-2000])", "invalid Arrow data"),
        (
            "data = stream(pa.record_batch({'z': pa.nulls(59_999)}))\n"
            "send(data.replace((59_999).to_bytes(8, 'little'), (1 << 40).to_bytes(8, 'little')))",
            "1099511627776 rows",
        ),
        ("send(stream(pa.RecordBatch.from_arrays([], [])))", "0 columns"),
        (
            "data = stream(words)\n"
            "import struct\n"
            "good = words.column(0).buffers()[1].to_pybytes()[:4004]\n"
            "at = data.index(good)\n"
            "send(data[:at + 2000] + struct.pack('<i', 0x7fffff00) + data[at + 2004:])",
            "invalid Arrow data",
        ),
        (
            "d = pa.array([[{'inner': 1}]] * 3)\n"
            "send(stream(pa.record_batch({'d': d})).replace(b'inner', b'\\xffnner'))",
            "invalid Arrow data: 'utf-8' codec",
        ),
        (
            "data = stream(words)\n"
            "at = data.index(b'alphabeta')\n"
            "send(data[:at] + b'\\xff' + data[at + 1:])",
            "invalid Arrow data",
        ),
    ],
)
def test_a_breach_of_the_protocol_kills_the_guest(start: Start, breach: str, words: str) -> None:
    guest = loaded(start, RAW_BATCH + breach)
    with pytest.raises(GuestDied, match=words):
        run(guest)
    assert not guest.alive


def test_a_thread_left_behind_does_nothing_between_jobs(start: Start) -> None:
    """It is stopped with its process; what it says when the next job begins ends the trust."""
    body = """
    import __main__, threading, time
    before = len(threading.enumerate())
    threading.Timer(0.5, lambda: __main__.WIRE.sendall(b"psst" * 99)).start()
    while before > 1: time.sleep(0.01)
    """
    guest = loaded(start, body)
    run(guest)
    assert guest.alive
    with pytest.raises(GuestDied, match="invalid message"):
        run(guest)


@pytest.mark.parametrize("setsid", [False, True])
def test_a_timeout_kills_the_grandchildren_too(start: Start, tmp_path: Path, setsid: bool) -> None:
    """They hold the writing end of a FIFO; it ends when they all have ended."""
    os.mkfifo(tmp_path / "held")
    body = f"""
    import subprocess
    held = open(file_path, "w")
    child = subprocess.Popen(["sleep", "1000"], stdout=held, start_new_session={setsid})
    daemon = "import os, time; os.fork() and os._exit(0); time.sleep(1000)"
    subprocess.run([sys.executable, "-c", daemon], stdout=held, start_new_session={setsid})
    while True: pass
    """
    guest = loaded(start, body, sandbox="off")
    reader = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(PluginTimeout, match="ran longer than 1 s"):
        list(guest.run(file_info(path=str(tmp_path / "held")), 1.0))
    assert select.select([reader], [], [], SECONDS) == ([reader], [], [])
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert not guest.alive


@pytest.mark.parametrize("setsid", [False, True])
def test_a_job_ends_though_its_children_hold_the_wire_and_they_end_with_the_guest(
    start: Start, tmp_path: Path, setsid: bool
) -> None:
    """The wire's end is no sign of a job's: END and DONE are, and the guest serves on."""
    os.mkfifo(tmp_path / "held")
    body = f"""
    import __main__, subprocess
    daemon = "import os, time; os.fork() and os._exit(0); time.sleep(1000)"
    if self.file.job_id == 1:
        with open(file_path, "w") as held:
            subprocess.run([sys.executable, "-c", daemon], stdout=held,
                start_new_session={setsid}, pass_fds=[__main__.WIRE.fileno()])
    self.publish("t", pa.table({{'n': [1]}}))
    """
    guest = loaded(start, body, sandbox="off")
    reader = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    for job_id in (1, 2):
        assert run(guest, job_id=job_id, path=str(tmp_path / "held"))["t"].num_rows == 1
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)  # it lives
    guest.close()
    assert select.select([reader], [], [], SECONDS) == ([reader], [], [])
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_slow_consumer_stops_the_guest(start: Start, tmp_path: Path) -> None:
    """It writes a byte for every batch it makes; the bytes stop coming."""
    os.mkfifo(tmp_path / "made")
    body = """
    made = os.open(file_path, os.O_WRONLY)
    def batches():
        for _ in range(1000):
            os.write(made, b".")
            yield pa.table({'n': pa.array(range(131_072))})
    self.publish("t", batches())
    """
    guest = loaded(start, body, sandbox="off")
    reader = os.open(tmp_path / "made", os.O_RDONLY | os.O_NONBLOCK)
    with closing(guest.run(file_info(path=str(tmp_path / "made")), SECONDS)) as batches:
        for _ in range(3):
            next(batches)
        made = b""
        while select.select([reader], [], [], 0.5)[0]:
            made += os.read(reader, 1000)
        assert 2 <= len(made) < 6  # two batches each
    os.close(reader)
    assert not guest.alive  # the rest of the job was thrown away with it


def test_the_guest_ends_with_its_host(
    environment: tuple[Path, Path], bundle_folder: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "held")
    source = plugin("held = open(file_path, 'w')\nheld.write('x'); held.flush()\nwhile True: pass")
    host = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from guests import artifact, file_info
        from casparian_flow.config import GuestSettings
        from casparian_flow.engine.bridge import Guest
        guest = Guest(Path({str(environment[0])!r}), Path({str(environment[1])!r}),
            artifact({source!r}), folder=Path({str(tmp_path)!r}),
            bundle=Path({str(bundle_folder)!r}), limits=GuestSettings(sandbox="off"))
        guest.load()
        list(guest.run(file_info(path={str(tmp_path / "held")!r}), 1000))
    """)
    process = subprocess.Popen([sys.executable, "-c", host], cwd=Path(__file__).parents[2])
    with open(tmp_path / "held", "rb", buffering=0) as held:
        assert held.read(1) == b"x"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert select.select([held], [], [], SECONDS)[0]
        assert held.read(1) == b""


def test_another_thread_can_end_what_runs(start: Start) -> None:
    guest = loaded(start, "self.publish('t', pa.table({'n': [1]}))\nwhile True: pass")
    batches = guest.run(file_info(), SECONDS)
    next(batches)
    threading.Thread(target=guest.interrupt).start()
    with pytest.raises(GuestDied):
        next(batches)
    guest.interrupt()
    assert not guest.alive


def test_a_closed_guest_leaves_when_asked(start: Start) -> None:
    guest = loaded(start, "import atexit; atexit.register(lambda: print('bye', flush=True))")
    run(guest)
    guest.close()
    guest.close()
    assert guest.take_log() == "bye\n"
    with pytest.raises(GuestDied):
        run(guest)


def test_a_plugin_without_streams_does_not_spin_the_host(start: Start) -> None:
    guest = loaded(start, "os.close(1); os.close(2)\nself.publish('t', pa.table({'n': [1]}))")
    assert run(guest)["t"].num_rows == 1


def test_an_interpreter_that_is_gone_is_our_fault(
    environment: tuple[Path, Path], start: Start, bundle_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match="cannot start plugin demo"):
        Guest(
            tmp_path / "no-python",
            environment[1],
            artifact(b""),
            folder=tmp_path,
            bundle=bundle_folder,
            limits=GuestSettings(),
        )


def test_the_bundle_is_made_once_and_read_only(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    assert bundle(tmp_path) == folder
    assert [entry.name for entry in (tmp_path / "guest").iterdir()] == [folder.name]
    files = [file for file in folder.rglob("*") if file.is_file()]
    sources = [file for file in files if file.suffix == ".py"]
    package = folder / "casparian_flow"
    assert {str(file.relative_to(package)) for file in sources} == set(BUNDLED)
    assert len(files) == 2 * len(sources)  # each with its byte code
    assert all(file.stat().st_mode & 0o222 == 0 for file in sources)


def test_the_hosts_own_work_is_not_the_plugins_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes a batch to a disk that takes an hour for it."""
    late = 0.0
    clock = types.SimpleNamespace(
        monotonic=lambda: time.monotonic() + late, thread_time=time.thread_time
    )
    monkeypatch.setattr(bridge, "time", clock)
    guest = loaded(start, "for n in range(3): self.publish('t', pa.table({'n': [n]}))")
    batches = 0
    for _ in guest.run(file_info(), SECONDS):
        batches += 1
        late += 3600.0
    assert batches == 3


def test_what_a_plugin_says_of_its_failure_is_kept_short() -> None:
    for kind in ("refused", "exception"):
        failure = msgspec.convert(
            {"kind": kind, "message": "x" * 7_000_000, "traceback": ""}, Failure
        )
        assert len(failure.error("plugin p 1.0", 0).message) < 3_000


def test_a_module_that_is_imported_too_long_is_told_apart_from_a_slow_job(start: Start) -> None:
    guest = start(b"import time; time.sleep(3600)")
    with pytest.raises(PluginTimeout, match="to be imported") as caught:
        guest.load(0.5)
    assert "top level" in caught.value.hint


HELD = "from casparian_flow.contract import Held"


@pytest.mark.parametrize(
    ("body", "fault", "words"),
    [
        (f"{HELD}; raise Held('held: column a is new')", Held, "held: column a is new"),
        (f"{HELD}; raise Held('column a is new')", Held, "held: column a is new"),
        (f"{HELD}; raise type('Mine', (Held,), {{}})('x')", Held, "held: x"),
        (f"{HELD}; raise Held('x' * 99_999)", Held, "(99999 characters)"),
        ("raise type('Held', (Exception,), {})('held: x')", PluginFailed, "plugin demo 1.0.0: "),
        (f"{HELD}\ntry: self.publish('u', None)\nexcept ValueError: raise Held('x')",
         OutputRefused, "topic 'u' is not declared"),
    ],
)  # fmt: skip
def test_a_held_version_is_told_apart_by_its_type(
    start: Start, body: str, fault: type[JobError], words: str
) -> None:
    with closing(loaded(start, body)) as guest:
        with pytest.raises(JobError) as caught:
            run(guest)
        assert type(caught.value) is fault
        assert words in caught.value.message
        assert caught.value.message.startswith("held: ") == (fault is Held)
        assert len(caught.value.message) < 3_000
        assert guest.alive
