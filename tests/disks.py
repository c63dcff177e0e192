"""Filesystems of a test's own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def in_memory(folder: Path, size: str, files: int = 0) -> Iterator[Path]:
    """A filesystem with so much room, as tmpfs counts it; skips where only root may mount.

    Args:
        files: how many files and folders it takes, itself among them; 0: any number.
    """
    folder.mkdir()
    room = f"size={size},nr_inodes={files}"
    mount = ["mount", "-t", "tmpfs", "-o", room, "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount: full and read-only disks are untested")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
