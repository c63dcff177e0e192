"""The Runner: what becomes of an attempt before, around and after its guest."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow import config
from casparian_flow.config import GuestSettings
from casparian_flow.engine import batches, bridge, byte_code, endings, guest_process, sinks
from casparian_flow.engine import runner as runner_module
from casparian_flow.engine.environments import EnvironmentStore
from casparian_flow.engine.runner import Runner
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.protocol import Assignment, Outcome, Output, Receipt, Welcome
from tests.engine.guests import artifact, plugin

Make = Callable[..., Runner]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Make]:
    """Make Runners; they let their guests go at the end."""
    made: list[Runner] = []

    def make(**limits: Any) -> Runner:
        welcome = Welcome(
            guests_folder=str(tmp_path / "guests"), inode=0, database=str(tmp_path / "ledger"),
            guests=4, limits=GuestSettings(**limits),
        )  # fmt: skip
        made.append(Runner(welcome, config.cache_folder()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def assignment(path: Path, content: bytes, **facts: Any) -> Assignment:
    return Assignment(
        **{
            "job_id": 1, "fence": 1, "attempt": "x-1", "plugin_id": 1, "plugin_version": "1",
            "version_id": 1, "source": "s", "path": os.fsencode(path), "rel_path": path.name,
            "content_hash": hashlib.sha256(content).hexdigest(), "size_bytes": len(content),
            "timeout_seconds": 30.0, "outputs": [], **facts,
        }
    )  # fmt: skip


def run(runner: Runner, job: Assignment, source: bytes, lock: str = "") -> Receipt:
    (receipt,) = runner.run([(job, msgspec.structs.replace(artifact(source), lock=lock))])
    return receipt


@pytest.mark.parametrize("led_to", ["secret", "."])
def test_a_large_file_that_is_a_link_now_is_shown_to_nobody(
    runner: Make, tmp_path: Path, default_lock: str, led_to: str
) -> None:
    (tmp_path / "secret").write_bytes(b"the version")
    large = tmp_path / "large.txt"
    large.symlink_to(tmp_path / led_to)
    job = assignment(large, b"the version")
    spy = b"import sys; print(sys.argv)"
    receipt = run(runner(copy_limit_bytes=1), job, spy, default_lock)
    assert receipt.outcome is Outcome.SUPERSEDED
    assert (receipt.sandbox, receipt.log) == ("", ""), "no guest was started"


def test_a_guest_that_cannot_be_started_leaves_no_folder(
    runner: Make, tmp_path: Path, default_lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(bridge, "spawn", spawn)
    (tmp_path / "a.txt").write_bytes(b"x")
    receipt = run(runner(), assignment(tmp_path / "a.txt", b"x"), b"", default_lock)
    assert receipt.outcome is Outcome.RELEASED
    assert list((tmp_path / "guests").iterdir()) == []


def test_a_job_that_fails_by_itself_while_we_leave_has_failed(
    runner: Make, tmp_path: Path, default_lock: str
) -> None:
    """It was given the time; only what was killed is nobody's fault."""
    fifo = tmp_path / "fifo"
    (tmp_path / "a.txt").write_bytes(b"x")
    os.mkfifo(fifo)
    waits = plugin(f"open({str(fifo)!r}).read()\nraise ValueError('by itself')")
    ours = runner(sandbox="off")

    def leave() -> None:
        with open(fifo, "w"):  # it has begun, and now it goes on
            ours.halt()

    leaving = threading.Thread(target=leave)
    leaving.start()
    receipt = run(ours, assignment(tmp_path / "a.txt", b"x"), waits, default_lock)
    leaving.join()
    assert receipt.outcome is Outcome.FAILED
    assert "by itself" in receipt.error


@pytest.mark.parametrize("end", ["halt", "revoke"])
def test_an_environment_that_is_being_built_holds_nobody_up(
    runner: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    fifo, uv = tmp_path / "fifo", tmp_path / "uv"
    (tmp_path / "a.txt").write_bytes(b"x")
    os.mkfifo(fifo)
    uv.write_text(f"#!/bin/sh\necho begun > {fifo}\nexec sleep 3600\n")
    uv.chmod(0o755)
    monkeypatch.setattr("uv.find_uv_bin", lambda: str(uv))
    ours = runner()

    def leave() -> None:
        assert fifo.read_text() == "begun\n"
        ours.halt(kill=True) if end == "halt" else ours.revoke({(1, 1)})

    leaving = threading.Thread(target=leave)
    leaving.start()
    lock = f"nobody-has-this=={os.getpid()} --hash=sha256:{'0' * 64}\n"
    receipt = run(ours, assignment(tmp_path / "a.txt", b"x"), b"", lock)
    leaving.join()
    assert receipt.outcome is Outcome.RELEASED


FINE = plugin("self.publish('t', pa.table({'n': [1]}))")
FAULTS = [ValueError("boom"), RecursionError("deep"), MemoryError(), OSError(5, "I/O error")]


def raiser(fault: Exception) -> Callable[..., Any]:
    def raises(*_: object, **__: object) -> None:
        raise fault

    return raises


STEPS: dict[str, tuple[object, str]] = {
    "start": (bridge, "spawn"),
    "load": (bridge.Guest, "load"),
    "wait for it": (bridge.Guest, "_await_wire"),
    "read a frame": (bridge.Guest, "_header"),
    "read a record": (bridge.Guest, "_record"),
    "read a batch": (batches, "read_batch"),
    "read what it prints": (bridge.Guest, "_drain"),
    "its log": (bridge.Guest, "take_log"),
    "what it used": (guest_process.Meter, "_rss"),
    "whether it lives": (bridge.Guest, "alive"),
    "its end": (bridge.Guest, "close"),
    "why it ended": (guest_process.Meter, "cause"),
    "the byte code": (byte_code, "real_modules"),
    "the place of its file": (runner_module, "placed"),
    "the mark of what is in hand": (endings, "held"),
    "the bundle": (runner_module, "bundle"),
    "the environment": (EnvironmentStore, "lease"),
    "the folder it left": (runner_module, "clear_away"),
    "the sink": (sinks, "open_sink"),
    "staging a batch": (Stage, "write"),
    "the end of staging": (Stage, "finish"),
    "sealing": (sinks, "seal"),
    "throwing away": (Stage, "discard"),
}


@pytest.mark.parametrize(("step", "fault"), [*zip(STEPS, cycle(FAULTS), strict=False)])
@pytest.mark.slow_but("load-fault1", "wait for it-fault2", "the sink-fault18", "sealing-fault21")
def test_no_exception_of_any_step_leaves_the_attempt(
    runner: Make, tmp_path: Path, default_lock: str, step: str, fault: Exception
) -> None:
    """Each is a receipt, and the worker goes on with the next job."""
    (tmp_path / "a.txt").write_bytes(b"x")
    plan = Output(
        topic="t", uri="parquet://out", location=f"parquet://{tmp_path}/out", mode="append",
        output_key="k" * 64, source="s", path=b"a.txt", ordinal=1, content_hash="c" * 64,
        file_bytes=1, plugin="p", plugin_version="1", artifact_hash="a" * 64, version_id=1,
        job_id=1,
    )  # fmt: skip
    job = assignment(tmp_path / "a.txt", b"x", outputs=[plan])
    ours = runner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*STEPS[step], raiser(fault))
        receipt = run(ours, job, FINE, default_lock)
        assert receipt.outcome in (Outcome.FAILED, Outcome.RELEASED, Outcome.STAGED)
        assert receipt.error or receipt.outcome is Outcome.STAGED, "it says why"
        ours.close()
    again = msgspec.structs.replace(job, attempt="x-2")
    receipt = run(ours, again, FINE, default_lock)
    assert receipt.outcome is Outcome.STAGED
    assert receipt.outputs[0].rows == 1


def test_words_that_are_no_text_come_through(
    runner: Make, tmp_path: Path, default_lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    fault = ValueError("lone \ud800, NUL \0, and long " + "x" * 10_000_000)
    monkeypatch.setattr(bridge.Guest, "take_log", raiser(fault))
    receipt = run(runner(), assignment(tmp_path / "a.txt", b"x"), FINE, default_lock)
    assert receipt.outcome is Outcome.FAILED
    assert len(msgspec.json.encode(receipt)) < 20_000
