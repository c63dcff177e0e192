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


TYPED = {
    "id": "integer",
    "at": "timestamp",
    "day": "date",
    "amount": "decimal(18,2)",
    "pieces": "integer",
    "weight": "double",
    "city": "text",
    "paid": "boolean",
}
"""Column -> type of what `typed_file` writes."""


def typed_file(folder: Path, rows: int, faults: int) -> Path:
    """Write a CSV file of eight columns, a tenth of its rows with quotes, and some with a fault."""
    numbers = random.Random(SEED)
    folder.mkdir()
    broken = set(numbers.sample(range(rows), faults))
    with (folder / "typed.csv").open("w", encoding="utf-8") as file:
        file.write(f"{','.join(TYPED)}\n")
        for row in range(rows):
            day = f"2026-{numbers.randrange(1, 13):02}-{numbers.randrange(1, 29):02}"
            amount = f"{numbers.randrange(-99, 10**6)}.{numbers.randrange(100):02}"
            city = '"K\u00f6ln, S\u00fcd"' if row % 10 == 0 else f"city {numbers.randrange(10**6)}"
            fields = (
                str(row),
                f"{day} {row % 24:02}:{row % 60:02}:{row % 59:02}",
                "2026-02-30" if row in broken else day,
                amount,
                str(numbers.randrange(1000)),
                f"{numbers.random():.6f}",
                city,
                "true" if row % 3 else "false",
            )
            file.write(f"{','.join(fields)}\n")
    return folder
