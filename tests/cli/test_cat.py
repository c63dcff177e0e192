"""`casparian cat` prints the bytes of a version, whole, or nothing and why."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.cli import main
from casparian_flow.engine.contents import SMALL_BYTES
from tests.commands import Casparian

BINARY = bytes(range(256)) * 3
LARGE = os.urandom(3 << 20)


@pytest.fixture
def recorded(casparian: Casparian, source: Path) -> Casparian:
    """A file with two versions, of which the second is there."""
    for content in (BINARY, LARGE):
        (source / "a.bin").write_bytes(content)
        casparian.run("scan")
    return casparian


def cat(casparian: Casparian, *arguments: str) -> tuple[int, bytes, str]:
    """Exit code, what went to stdout as bytes, and to stderr."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with (
        contextlib.chdir(casparian.folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["casparian", "cat", *arguments])
        main()
    out.flush()
    return int(ended.value.code or 0), out.buffer.getvalue(), err.getvalue()  # type: ignore[attr-defined]


def store(casparian: Casparian) -> Path:
    (folder,) = (casparian.folder / ".casparian" / "store").iterdir()
    return folder


def test_each_version_is_printed_as_it_was(recorded: Casparian, source: Path) -> None:
    assert cat(recorded, "in/a.bin", "--version", "1") == (0, BINARY, "")
    assert cat(recorded, "in/a.bin") == (0, LARGE, "")
    (source / "a.bin").unlink()
    recorded.run("scan")
    assert cat(recorded, str(source / "a.bin"), "--version", "2") == (0, LARGE, "")
    said = recorded.json("versions", "in/a.bin")
    assert [row["bytes"] for row in said] == ["kept", "kept"]


def test_what_is_not_there_is_named(recorded: Casparian) -> None:
    code, out, said = cat(recorded, "in/a.bin", "--version", "3")
    assert (code, out) == (66, b"") and "in/a.bin has no version 3" in said
    code, out, said = cat(recorded, "in/b.bin")
    assert (code, out) == (66, b"") and "no file is known as in/b.bin" in said


def test_without_the_store_the_file_has_its_own_bytes_until_it_changes(
    recorded: Casparian, source: Path
) -> None:
    shutil.rmtree(store(recorded))
    assert cat(recorded, "in/a.bin") == (0, LARGE, "")
    code, out, said = cat(recorded, "in/a.bin", "--version", "1")
    assert (code, out) == (1, b"")
    assert "the bytes of version 1 of in/a.bin are gone: " in said
    (source / "a.bin").write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    code, out, said = cat(recorded, "in/a.bin")
    assert (code, out) == (1, b"") and "and the file has other bytes now" in said
    (source / "a.bin").unlink()
    assert "and the file is gone" in cat(recorded, "in/a.bin")[2]


@pytest.mark.parametrize("content", [BINARY, LARGE], ids=["row", "file"])
def test_not_a_byte_of_a_damaged_content_is_printed(
    recorded: Casparian, source: Path, content: bytes
) -> None:
    (source / "a.bin").unlink()
    folder = store(recorded)
    digest = hashlib.sha256(content).hexdigest()
    small = len(content) <= SMALL_BYTES
    file = folder / "small.sqlite3" if small else folder / digest[:2] / digest
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(content[:100]) + 50] ^= 1
    file.chmod(0o600)
    file.write_bytes(damaged)
    code, out, said = cat(recorded, "in/a.bin", "--version", "1" if small else "2")
    assert (code, out) == (1, b"")
    assert "the store's copy is damaged" in said
    assert (
        f"content {digest[:12]} (version {1 if small else 2} of in/a.bin)"
        in recorded.run("verify", code=1).stdout
    )


def test_a_reader_that_leaves_early_is_no_error(recorded: Casparian) -> None:
    config = recorded.folder / "global_config.toml"
    command = f"{sys.executable} -m casparian_flow.cli --config {config} cat in/a.bin | head -c 10"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert (done.stdout, done.stderr) == (LARGE[:10], b"")


def test_a_path_that_may_be_two_files_is_not_guessed(recorded: Casparian, source: Path) -> None:
    other = source.with_name("other")
    other.mkdir()
    (other / "a.bin").write_bytes(b"other")
    recorded.run("source", "add", str(other), "--settle", "0")
    recorded.run("scan")
    code, out, said = cat(recorded, "a.bin")
    assert (code, out) == (1, b"") and "in/a.bin or other/a.bin" in said
    assert cat(recorded, "other/a.bin") == (0, b"other", "")


def test_the_table_of_earlier_releases_is_refused_with_what_to_write_now(
    casparian: Casparian,
) -> None:
    with (casparian.folder / "global_config.toml").open("a") as file:
        file.write('[snapshots]\nmode = "off"\nkeep_bytes = 7\n')
    said = casparian.run("status", code=78).stderr
    assert "the table [snapshots] is [store] now, and `mode` is `keep`" in said
    assert "[store] with keep = false, keep_bytes = 7" in said
