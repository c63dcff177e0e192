"""Nothing that a plugin tries touches the host, and the next job completes. Real guests only."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from casparian_flow.config import GuestSettings
from casparian_flow.engine.bridge import Guest
from casparian_flow.errors import JobError
from proofs.hostile import corpus
from proofs.hostile.attacks import ATTACKS, Attack
from tests.engine.guests import SECONDS, artifact, file_info, plugin

BODY = """
import ctypes, socket
def syscall(number, *arguments):
    return ctypes.CDLL(None).syscall(number, *arguments)
given = json.load(open(file_path))
try:
    exec(given["code"], {"T": given["targets"], "os": os, "pa": pa, "socket": socket,
        "syscall": syscall, "file_path": file_path})
except BaseException as error:
    self.publish("t", pa.table({"harm": [False], "error": [repr(error)]}))
else:
    self.publish("t", pa.table({"harm": [True], "error": [""]}))
"""


CORPUS = """
import types
module = types.ModuleType("hostile")
exec(compile({source!r}, "hostile.py", "exec", dont_inherit=True), module.__dict__)
tables = []
handler = module.Handler()
handler._publish = lambda topic, data: tables.append(data)
handler.execute({path!r})
if not tables[0]["harm"][0].as_py(): raise OSError("no harm")
"""
"""Runs a whole plugin of the Gatekeeper's corpus, as if nobody had read it."""


class Victim(NamedTuple):
    """What an attack may not reach, and how to see whether it did."""

    secret: Path
    targets: dict[str, Any]
    listeners: list[socket.socket]
    signals: list[int]

    def harms(self) -> list[str]:
        """What has happened to us."""
        found = []
        look = self.secret.stat()
        if self.secret.read_text() != "secret\n" or look.st_mode & 0o777 != 0o644:
            found.append("the secret was changed")
        if look.st_mtime != 1_000_000 or look.st_nlink != 1 or os.listxattr(self.secret):
            found.append("the secret's metadata was changed")
        if os.listdir(self.secret.parent) != [self.secret.name]:
            found.append("something was planted")
        for listener in self.listeners:
            try:
                listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(1)
            except BlockingIOError:
                continue
            found.append(f"something came to {listener.getsockname()!r}")
        if self.signals:
            found.append("a signal came")
        for folder in ("/tmp", "/dev/shm"):
            found += [name for name in os.listdir(folder) if name.startswith("casparian-planted")]
        return found


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("v")
    secret = folder / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("secret\n")
    secret.chmod(0o644)
    os.utime(secret, (1_000_000, 1_000_000))
    kinds = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "unix": (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "s")),
        "unix_dgram": (socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "d")),
        "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0casparian-{os.getpid()}"),
    }
    targets: dict[str, Any] = {"secret": str(secret), "host": os.getpid()}
    listeners = []
    for name, (family, kind, address) in kinds.items():
        listener = socket.socket(family, kind)
        listener.setblocking(False)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        inet = family == socket.AF_INET
        targets[name] = listener.getsockname()[1] if inet else str(address).strip("\0")
        listeners.append(listener)
    signals: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HOSTPW", "AZURE_CLIENT_SECRET", "CASPARIAN_CONFIG"):
            patch.setenv(name, "secret")
        yield Victim(secret, targets, listeners, signals)
    signal.signal(signal.SIGUSR1, before)
    for listener in listeners:
        listener.close()


class Cell:
    """A warm guest, replaced when an attack ends it."""

    def __init__(
        self, environment: tuple[Path, Path], bundle_folder: Path, folder: Path, victim: Victim
    ) -> None:
        self._environment = environment
        self._bundle = bundle_folder
        self._folder = folder
        self._targets = victim.targets
        self._guest: Guest | None = None
        for inner in ("in", "tmp"):
            (folder / inner).mkdir()

    @property
    def guest(self) -> Guest:
        if self._guest is None or not self._guest.alive:
            self.close()
            self._guest = Guest(
                *self._environment, artifact(plugin(BODY)),
                folder=self._folder, bundle=self._bundle, limits=GuestSettings(),
            )  # fmt: skip
            self._guest.load()
        return self._guest

    def run(self, code: str) -> dict[str, Any]:
        """One job; what the attack made of it, or what became of the guest."""
        placed = self._folder / "in" / "input.json"
        placed.unlink(missing_ok=True)
        placed.write_text(json.dumps({"code": code, "targets": self._targets}))
        placed.chmod(0o400)
        before = placed.stat()
        try:
            rows = [
                row
                for _, batch in self.guest.run(file_info(path=str(placed)), SECONDS)
                for row in batch.to_pylist()
            ]
        except JobError as error:
            rows = [{"harm": False, "error": repr(error)}]
        after = placed.stat()
        assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
        return dict(rows[0])

    def run_plugin(self, source: bytes) -> dict[str, Any]:
        """The same for a whole plugin, whose input says where the secret is."""
        placed = self._folder / "in" / "secret.txt"
        placed.write_text(self._targets["secret"])
        return self.run(CORPUS.format(source=source, path=str(placed)))

    def close(self) -> None:
        if self._guest:
            self._guest.close()


@pytest.fixture(scope="module")
def cell(
    environment: tuple[Path, Path],
    bundle_folder: Path,
    victim: Victim,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cell]:
    cell = Cell(environment, bundle_folder, tmp_path_factory.mktemp("cell"), victim)
    yield cell
    cell.close()


def test_what_holds_here(cell: Cell) -> None:
    assert cell.guest.sandbox == "limits, namespaces, landlock, seccomp"


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.row}-{attack.name}")
@pytest.mark.slow_cases("50-bytearrays")
def test_an_attack_does_no_harm(attack: Attack, cell: Cell, victim: Victim) -> None:
    outcome = cell.run(attack.code)
    assert victim.harms() == []
    assert not outcome["harm"]
    assert "NameError" not in outcome["error"]
    assert "SyntaxError" not in outcome["error"]
    assert cell.run("pass")["harm"]  # the next job completes


@pytest.mark.parametrize("attack", corpus.ATTACKS, ids=lambda attack: attack.id)
def test_what_the_gatekeeper_would_have_found_does_no_harm_either(
    attack: corpus.Attack, cell: Cell, victim: Victim
) -> None:
    outcome = cell.run_plugin(attack.source)
    assert victim.harms() == []
    assert not outcome["harm"]
    assert cell.run("pass")["harm"]
