"""The benchmarks' input: files and folders generated from one seed."""

from __future__ import annotations

import random
from pathlib import Path

SEED = 20_260_101


def csv_files(folder: Path, count: int) -> Path:
    """Write `count` different files of 8.1 KB: 100 rows of 8 random numbers."""
    numbers = random.Random(SEED)
    folder.mkdir()
    header = ",".join(f"column_{n}" for n in range(8))
    for file in range(count):
        rows = (",".join(f"{numbers.random():.7f}" for _ in range(8)) for _ in range(100))
        (folder / f"measurements-{file:05}.csv").write_text("\n".join((header, *rows, "")))
    return folder


def tiny_files(folder: Path, count: int) -> Path:
    """Write `count` different files of a few bytes, a hundred to a folder."""
    for file in range(count):
        parent = folder / f"folder-{file // 100:04}"
        if file % 100 == 0:
            parent.mkdir(parents=True)
        (parent / f"file-{file:06}.txt").write_text(f"{SEED} {file}\n")
    return folder


def random_files(folder: Path, count: int, size: int) -> Path:
    """Write `count` files of `size` random bytes, a hundred to a folder."""
    bytes_ = random.Random(SEED)
    for file in range(count):
        parent = folder / f"folder-{file // 100:04}"
        if file % 100 == 0:
            parent.mkdir(parents=True)
        (parent / f"file-{file:06}.bin").write_bytes(bytes_.randbytes(size))
    return folder
