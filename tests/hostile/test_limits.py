"""Time, memory, output, scratch space and threads of a guest end where the limits say."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.config import GuestSettings
from casparian_flow.engine import canary
from casparian_flow.errors import (
    GuestDied,
    OutOfMemory,
    OutputRefused,
    PluginFailed,
    PluginTimeout,
    SandboxUnavailable,
    Unavailable,
)
from casparian_flow.security import kernel
from casparian_flow.security.sandbox import InPlace
from tests.engine.guests import Start, file_info, loaded, plugin, run

IGNORE = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
MASK = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
STOP = "os.kill(os.getpid(), 19)\n"


@pytest.mark.parametrize("first", ["", IGNORE, MASK])
def test_a_spinner_uses_up_its_processor_time(start: Start, first: str) -> None:
    guest = loaded(start, f"{first}while True: pass", cpu_seconds=0.2)
    with pytest.raises(PluginTimeout, match=r"0\.2 s of processor time") as caught:
        run(guest)
    assert "cpu_seconds under [guest]" in caught.value.hint
    assert not guest.alive


@pytest.mark.slow
def test_each_job_has_its_own_processor_time(start: Start) -> None:
    body = """
    import time
    end = time.process_time() + 0.5
    while time.process_time() < end: pass
    """
    guest = loaded(start, body, cpu_seconds=0.9)
    for _ in range(3):
        run(guest)


@pytest.mark.parametrize("first", ["", MASK, STOP])
def test_a_sleeper_meets_the_wall_clock(start: Start, first: str) -> None:
    guest = loaded(start, f"{first}import time\ntime.sleep(9999)")
    with pytest.raises(PluginTimeout, match=r"longer than 0\.3 s"):
        list(guest.run(file_info(), 0.3))


def test_a_slow_speaker_meets_the_wall_clock(start: Start) -> None:
    body = """
    import __main__, time
    for byte in bytes(1000):
        __main__.WIRE.sendall(bytes([byte]))
        time.sleep(0.05)
    """
    with pytest.raises(PluginTimeout, match=r"longer than 0\.5 s"):
        list(loaded(start, body).run(file_info(), 0.5))


def test_a_flood_of_valid_batches_ends_at_the_output_limit(start: Start) -> None:
    body = """
    def flood():
        while True: yield pa.table({'n': pa.array(range(65536))})
    self.publish("t", flood())
    """
    guest = loaded(start, body, output_limit_bytes=8 << 20)
    with pytest.raises(OutputRefused, match="more than 8388608 bytes"):
        run(guest)
    assert not guest.alive


@pytest.mark.slow
def test_memory_ends_at_the_lower_of_both_limits(start: Start) -> None:
    body = "kept = [bytearray(64 << 20) for _ in range(100)]"
    for wants, limit in ((1 << 30, 4 << 30), (8 << 30, 1 << 30)):
        guest = start(plugin(body), wants={"memory_bytes": wants}, memory_bytes=limit)
        guest.load()
        with pytest.raises(OutOfMemory, match=r"MemoryError; the limit is 1024 MiB"):
            run(guest)
        guest.close()


def test_a_bomb_of_threads_meets_the_memory_limit(start: Start) -> None:
    body = """
    import threading
    wait = threading.Event()
    try:
        for started in range(3000): threading.Thread(target=wait.wait, daemon=True).start()
    except (RuntimeError, MemoryError): wait.set()
    for thread in threading.enumerate()[1:]: thread.join()
    self.publish("t", pa.table({'started': [started]}))
    """
    guest = start(plugin(body), memory_bytes=2 << 30)
    guest.load()
    assert run(guest)["t"]["started"][0].as_py() < 300


def test_a_crash_leaves_no_core(start: Start, tmp_path: Path) -> None:
    with pytest.raises(GuestDied, match="SIGABRT"):
        run(loaded(start, "os.abort()"))
    assert not [file for file in tmp_path.rglob("*") if "core" in file.name]


FILL = """
import tempfile
written = 0
try:
    for number in range(1000):
        with open(os.path.join(tempfile.gettempdir(), str(number)), "wb") as file:
            written += file.write(bytes(1 << 18))
            file.flush()
except OSError as error:
    words = str(error)
self.publish("t", pa.table({'written': [written], 'words': [words]}))
"""


def test_many_small_files_meet_the_size_of_the_scratch_space(start: Start) -> None:
    guest = start(plugin(FILL), wants={"scratch_bytes": 4 << 20}, scratch_bytes=8 << 20)
    guest.load()
    for _ in range(2):  # the second job finds it empty again
        row = run(guest)["t"].to_pylist()[0]
        assert 3 << 20 <= row["written"] <= 4 << 20
        assert "No space left" in row["words"]


def test_without_scratch_space_nothing_can_be_written(start: Start) -> None:
    guest = start(plugin("open(os.path.join(os.environ['TMPDIR'], 'x'), 'w')"))
    guest.load()
    with pytest.raises(PluginFailed, match="Read-only file system"):
        run(guest)


def test_a_large_file_is_all_that_its_guest_sees_outside(start: Start, tmp_path: Path) -> None:
    large, other = tmp_path / "large.csv", tmp_path / "other.csv"
    large.write_text("a\n1\n")
    other.write_text("secret")
    body = """
    open(file_path).read()
    self.publish("t", pa.table({'seen': [os.path.exists(file_path.replace("large", "other"))]}))
    """
    look = large.stat()
    guest = start(plugin(body), in_place=InPlace(str(large), look.st_dev, look.st_ino))
    guest.load()
    assert run(guest, path=str(large))["t"]["seen"].to_pylist() == [False]


@pytest.mark.parametrize("led_to", ["other.csv", "."])
def test_no_foreign_code_runs_where_a_large_file_was_exchanged(
    start: Start, tmp_path: Path, led_to: str
) -> None:
    """After it was proved, and before the guest took hold of it: a link to a file, or to a tree."""
    large, other = tmp_path / "large.csv", tmp_path / "other.csv"
    large.write_text("a\n1\n")
    other.write_text("secret")
    look = large.stat()
    large.rename(tmp_path / "away.csv")
    large.symlink_to(tmp_path / led_to)
    guest = start(b"print('foreign code')", in_place=InPlace(str(large), look.st_dev, look.st_ino))
    with pytest.raises(GuestDied):
        guest.load()
    log = guest.take_log()
    assert "was replaced by another file" in log
    assert "foreign code" not in log


FETCH = """
import urllib.request
with urllib.request.urlopen(f"http://127.0.0.1:{self.file.size_bytes}/", timeout=5) as reply:
    self.publish("t", pa.table({'said': [reply.read()]}))
"""


@pytest.mark.parametrize(("wants", "grants"), [(True, True), (True, False), (False, True)])
def test_the_network_takes_two_to_grant(start: Start, wants: bool, grants: bool) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        guest = start(plugin(FETCH), wants={"network": wants}, network=grants)
        guest.load()
        try:
            if wants and grants:
                table = run(guest, size_bytes=server.server_port)["t"]
                assert table["said"].to_pylist() == [b"hello"]
            else:
                with pytest.raises(PluginFailed, match="Operation not permitted"):
                    run(guest, size_bytes=server.server_port)
            assert ("network" in guest.sandbox) == (wants and grants)
        finally:
            server.shutdown()
            thread.join()


def test_the_canary_passes_here(tmp_path: Path) -> None:
    assert canary.check(GuestSettings(), tmp_path) == "limits, namespaces, landlock, seccomp"


KILLED = """
import os, signal
from pathlib import Path
from casparian_flow.engine import canary
from casparian_flow.config import GuestSettings

canary.Guest = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
canary.check(GuestSettings(), Path("cache"))
"""


def test_a_cache_that_cannot_be_used_is_said_in_words() -> None:
    with pytest.raises(Unavailable, match=r"cannot use .* /dev/null") as refused:
        canary.check(GuestSettings(), Path("/dev/null"))
    assert "XDG_CACHE_HOME" in refused.value.hint


def test_the_next_canary_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.rglob("secret")] == ["secret"]
    canary.check(GuestSettings(), tmp_path / "cache")
    assert not list(tmp_path.rglob("secret"))


def lame_bundle(folder: Path) -> Path:
    """What a guest imports from us, with a Landlock that is not there."""
    from casparian_flow.engine.environments import bundle

    lame = bundle(folder)
    file = lame / "casparian_flow" / "security" / "kernel.py"
    file.chmod(0o644)
    file.write_text(
        file.read_text().replace(
            "def landlock_abi() -> int:", "def landlock_abi() -> int:\n    return 0"
        )
    )
    shutil.rmtree(file.parent / "__pycache__")  # a guest takes the byte code without a look
    return lame


def test_a_kernel_without_landlock_runs_nothing_where_the_sandbox_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lame = lame_bundle(tmp_path)
    monkeypatch.setattr(canary, "bundle", lambda _: lame)
    with pytest.raises(SandboxUnavailable, match=r"no landlock.*no plugin was run") as caught:
        canary.check(GuestSettings(), tmp_path)
    assert caught.value.exit_code == 78
    assert "best-effort" in caught.value.hint
    held = canary.check(GuestSettings(sandbox="best-effort"), tmp_path)
    assert held == "limits, namespaces, seccomp"
    assert canary.check(GuestSettings(sandbox="off"), tmp_path) == "off"
    assert "sandbox is off" in caplog.text


OLD = """
import os, sys
sys.path.insert(0, {root!r})
from casparian_flow.security import kernel
kernel.landlock_abi = lambda: {version}
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.install_landlock([{folder!r}], [], False)
kernel.install_seccomp(os.getpid(), False)
for attempt in (
    lambda: os.open({folder!r} + "/file", os.O_RDONLY | os.O_TRUNC),
    lambda: os.open({folder!r} + "/file", os.O_WRONLY),
    lambda: os.truncate({folder!r} + "/file", 0),
    lambda: os.rename({folder!r} + "/file", {folder!r} + "/other"),
    lambda: os.open("/etc/passwd", os.O_RDONLY),
):
    try: attempt()
    except OSError: continue
    sys.exit("it got through")
print(open({folder!r} + "/file").read())
"""


@pytest.mark.parametrize("version", range(1, kernel.landlock_abi() + 1))
def test_seccomp_closes_what_an_old_landlock_lacks(version: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("whole")
    root = str(Path(__file__).parents[2])
    code = OLD.format(root=root, folder=str(tmp_path), version=version)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("whole\n", "")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_guest_is_not_run_where_the_sandbox_it_gets_is_not_whole(
    environment: tuple[Path, Path], tmp_path: Path
) -> None:
    from casparian_flow.engine.bridge import Guest
    from tests.engine.guests import artifact

    for inner in ("in", "tmp"):
        (tmp_path / "g" / inner).mkdir(parents=True)
    source = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    with (
        Guest(
            *environment, artifact(source),
            folder=tmp_path / "g", bundle=lame_bundle(tmp_path), limits=GuestSettings(),
        ) as guest,
        pytest.raises(Unavailable, match=r"incomplete .*: no landlock"),
    ):  # fmt: skip
        guest.load()
    assert not os.path.exists(tmp_path / "ran")
