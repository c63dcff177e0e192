"""Filesystems of a test's own; only root may mount them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *options: str | Path) -> Iterator[Path]:
    """A folder on which `mount` was called with these options; made where it is not there.

    Raises:
        PermissionError: this process may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount(folder, *options)
    try:
        yield folder
    finally:
        unmount(folder)


def mount(folder: Path, *options: str | Path) -> None:
    """Mount, or remount.

    Raises:
        PermissionError: this process may not mount.
    """
    if os.geteuid() != 0:
        raise PermissionError("only root can mount")
    command = ["mount", *options, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


def make(image: Path, size: int, *mkfs: str) -> None:
    """Make a filesystem in a file of so many bytes.

    Raises:
        CalledProcessError: `mkfs` refused.
    """
    with image.open("wb") as file:
        file.truncate(size)
    # mkfs warns that small inodes end in 2038.
    subprocess.run([*mkfs, image], capture_output=True, check=True)


def unmount(folder: Path) -> None:
    """Unmount, now where nobody uses it and else when the last user is gone."""
    subprocess.run(["umount", "-l", folder], check=True)


def tmpfs(size: str = "50%", *more: str) -> list[str]:
    """Options of a filesystem in memory with so much room, as tmpfs counts it."""
    return ["-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "none"]


@contextlib.contextmanager
def in_memory(folder: Path, size: str, files: int = 0) -> Iterator[Path]:
    """A filesystem with so much room; skips where only root may mount.

    Args:
        files: how many files and folders it takes, itself among them; 0: any number.
    """
    with or_skip(folder, *tmpfs(size, f"nr_inodes={files}")):
        yield folder


@contextlib.contextmanager
def or_skip(folder: Path, *options: str | Path) -> Iterator[Path]:
    """As `mounted`; skips where this process may not mount."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mounted(folder, *options))
        except PermissionError as error:
            pytest.skip(f"NOT TESTED, for want of a filesystem to mount: {error}")
        yield folder


def remount(folder: Path, option: str) -> None:
    """Change a filesystem that is mounted, such as `ro`, `rw` or `size=64m`."""
    mount(folder, "-o", f"remount,{option}")


def fill(folder: Path) -> Path:
    """Take the last free byte of a disk; the file that has it."""
    ballast = folder / "ballast"
    with (
        pytest.raises(OSError, match="No space"),
        open(ballast, "wb", buffering=0) as file,
    ):
        while file.write(bytes(4096)):
            pass
    return ballast
