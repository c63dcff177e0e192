"""A folder that somebody else has filled is removed, whatever is in it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow import durable, trees

DEEP = 5000
"""Levels: five times what Python may call itself, and paths far beyond PATH_MAX."""

FILL = """
import os, sys
os.chdir(sys.argv[1])
for level in range({deep}):
    name = "d" * 200 if level % 2 else "d"
    open("file", "w").close()
    os.mkdir(name, {mode})
    {enter}
"""


def fill(folder: Path, mode: int = 0o777, enter: str = "os.chdir(name)", deep: int = DEEP) -> None:
    """In a process of its own: no test's folder changes."""
    folder.mkdir(exist_ok=True)
    code = FILL.format(deep=deep, mode=mode, enter=enter)
    subprocess.run([sys.executable, "-c", code, folder], check=True)


@pytest.mark.slow
def test_folders_of_any_depth(tmp_path: Path) -> None:
    fill(tmp_path / "deep")
    for number in range(2500):
        (tmp_path / "deep" / f"{number}").write_bytes(b"x")
    trees.remove_tree(tmp_path / "deep")
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "deep")
    durable.remove(tmp_path / "deep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_deep_arms_and_names_of_all_kinds(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for arm in ("one", "two"):
        fill(top, deep=0)
        fill(top / arm, deep=1500)
    for name in (b"\xff\xfe", b"new\nline", b"-rf", b"." * 3, b"x" * 255):
        Path(os.fsdecode(os.fsencode(top) + b"/" + name)).mkdir()
    os.mkfifo(top / "fifo")
    trees.remove_tree(top)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    kept, top = tmp_path / "kept", tmp_path / "top"
    (kept / "inner").mkdir(parents=True)
    (kept / "inner" / "file").write_text("stays")
    (top / "a" / "b").mkdir(parents=True)
    (top / "link").symlink_to(kept)
    (top / "a" / "b" / "link").symlink_to(kept)
    trees.remove_tree(top)
    assert (kept / "inner" / "file").read_text() == "stays"
    (tmp_path / "link").symlink_to(kept)
    with pytest.raises(OSError, match="link"):
        trees.remove_tree(tmp_path / "link")
    assert (kept / "inner" / "file").read_text() == "stays"


NOBODY = 65534
WITHOUT_RIGHTS = """
import os, sys
sys.path.insert(0, {root!r})
from casparian_flow import trees
if os.getuid() == 0:
    os.setgid({nobody}); os.setuid({nobody})
top = os.path.join({folder!r}, "top")
for mode in (0o000, 0o100, 0o200, 0o400, 0o500, 0o300):
    inner = os.path.join(top, oct(mode))
    os.makedirs(os.path.join(inner, "a", "b"))
    open(os.path.join(inner, "a", "file"), "w").close()
    for each in ("a/b", "a", ""):
        os.chmod(os.path.join(inner, each), mode)
os.chmod(top, 0)
trees.remove_tree(top)
print(os.listdir({folder!r}))
"""


def test_folders_without_any_rights_are_removed_by_whom_they_belong_to(tmp_path: Path) -> None:
    """Run as an ordinary user, where this is root: root needs no rights."""
    import tempfile

    # In /tmp, since nobody else may enter a test's folder; the package is imported before.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        code = WITHOUT_RIGHTS.format(
            root=str(Path(__file__).parents[1]), folder=folder, nobody=NOBODY
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_cannot_be_removed_is_said_and_costs_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "stuck", "z"):
        (tmp_path / "top" / name).mkdir(parents=True)
    rmdir = os.rmdir

    def refusing(path: str, *, dir_fd: int | None = None) -> None:
        if path == "stuck":
            raise OSError(16, "Device or resource busy", path)
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refusing)
    with caplog.at_level(logging.WARNING):
        assert not trees.clear_away(tmp_path / "top")
    assert "cannot remove the folder" in caplog.text
    assert [each.name for each in (tmp_path / "top").iterdir()] == ["stuck"]
    monkeypatch.undo()
    assert trees.clear_away(tmp_path / "top")
    assert trees.clear_away(tmp_path / "top"), "it is gone already"
    with pytest.raises(FileNotFoundError):
        trees.remove_tree(tmp_path / "top")
