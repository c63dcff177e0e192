"""The inbox holds exactly the bytes of a version, or nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from casparian_flow.engine import inbox as inbox_module
from casparian_flow.engine.inbox import clear, hash_file, place
from casparian_flow.errors import Superseded, Unavailable

CONTENT = os.urandom(3 << 20)
HASH = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", [b"a.csv", b"\xff\xfe\n'\" .csv", b"n" * 255, "ünïcode".encode()])
def test_the_bytes_arrive_under_the_original_name(tmp_path: Path, inbox: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_bytes(CONTENT)
    before = os.stat(path)
    placed = place(path, inbox, name, HASH)
    assert os.fsencode(placed.name) == name
    assert placed.parent == inbox
    assert placed.read_bytes() == CONTENT
    assert placed.stat().st_mode & 0o777 == 0o400
    assert os.stat(path).st_ctime_ns == before.st_ctime_ns
    clear(placed)
    assert not list(inbox.iterdir())


def test_what_a_plugin_left_under_the_name_is_replaced(tmp_path: Path, inbox: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    (inbox / "a.csv").mkdir()
    (inbox / "a.csv" / "left").write_text("by the plugin")
    for _ in range(2):
        assert place(os.fsencode(file), inbox, b"a.csv", HASH).read_bytes() == CONTENT


def test_blocks_are_shared_where_the_filesystem_can(
    tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for the kernel of a filesystem with reflinks, which a test machine may lack."""

    def clone(target: object, request: int, source: int) -> int:
        assert request == inbox_module.FICLONE
        os.write(target.fileno(), os.pread(source, len(CONTENT), 0))  # type: ignore[attr-defined]
        os.lseek(target.fileno(), 0, os.SEEK_SET)  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    assert place(os.fsencode(file), inbox, b"a.csv", HASH).read_bytes() == CONTENT


def other_bytes(path: Path) -> None:
    path.write_bytes(b"other")


def nothing(path: Path) -> None:
    assert not path.exists()


def symlink(path: Path) -> None:
    path.with_name("target").write_bytes(CONTENT)
    path.symlink_to("target")


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "make", [other_bytes, nothing, symlink, os.mkfifo, Path.mkdir, bound_socket]
)
def test_a_version_whose_bytes_are_gone_is_superseded(
    tmp_path: Path, inbox: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.csv"
    make(path)
    with pytest.raises(Superseded, match="gone"):
        place(os.fsencode(path), inbox, b"a.csv", HASH)
    assert not list(inbox.iterdir())


def test_an_inbox_that_cannot_be_written_is_our_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    with pytest.raises(Unavailable, match="cannot copy"):
        place(os.fsencode(file), tmp_path / "no-inbox", b"a.csv", HASH)


def test_a_full_disk_is_our_fault_and_leaves_nothing(tmp_path: Path, inbox: Path) -> None:
    """A limit on file size stands in for the full disk: the write itself fails."""
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(Unavailable, match=os.strerror(errno.EFBIG)):
            place(os.fsencode(file), inbox, b"a.csv", HASH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(inbox.iterdir())


def test_hash_file(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    assert hash_file(os.fsencode(file)) == HASH
    with pytest.raises(Superseded, match="No such file"):
        hash_file(os.fsencode(tmp_path / "gone"))


def test_a_file_that_changes_while_it_is_hashed_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(CONTENT)
    digest = hashlib.file_digest

    def meanwhile(*arguments: object) -> object:
        with file.open("ab") as more:
            more.write(b"x")
        return digest(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    with pytest.raises(Superseded, match="changed while"):
        hash_file(os.fsencode(file))
