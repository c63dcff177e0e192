"""A script that a user would write, CSV files to Parquet on two processes: pandas_pool.py SOURCE

As durable as ours: each file is fsynced and renamed, and its folder fsynced.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pandas as pd


def convert(source: str) -> None:
    target = Path("output") / f"{Path(source).stem}.parquet"
    temporary = target.with_suffix(".tmp")
    pd.read_csv(source).to_parquet(temporary)
    fsync(temporary)
    temporary.rename(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main(source: Path) -> None:
    Path("output").mkdir()
    with multiprocessing.Pool(2) as pool:
        pool.map(convert, [str(file) for file in source.iterdir()])
        pool.close()
        pool.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
