"""Read a CSV file with types, keep what does not fit, write both as Parquet: pandas_typed.py FILE

What a careful user would write: all text first, then each column by itself. Grammars as strict as
ours are regular expressions over every cell.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa

INTEGER, NUMBER = r"0|-?[1-9][0-9]*", r"-?[0-9]+(\.[0-9]+)?"
CENTS = r"-?[0-9]{1,16}(\.[0-9]{1,2})?"


def main(source: str) -> None:
    text = pd.read_csv(source, dtype="string[pyarrow]", keep_default_na=False)
    fits = {
        "id": text["id"].str.fullmatch(INTEGER),
        "amount": text["amount"].str.fullmatch(CENTS),
        "pieces": text["pieces"].str.fullmatch(INTEGER),
        "weight": text["weight"].str.fullmatch(NUMBER),
        "paid": text["paid"].isin(["true", "false"]),
    }
    at = pd.to_datetime(text["at"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
    day = pd.to_datetime(text["day"], format="%Y-%m-%d", errors="coerce")
    good = at.notna() & day.notna()
    for each in fits.values():
        good &= each.astype(bool)
    kept = text[good]
    rows = pd.DataFrame({
        "id": kept["id"].astype("int64[pyarrow]"),
        "at": at[good],
        "day": day[good].dt.date.astype(pd.ArrowDtype(pa.date32())),
        "amount": kept["amount"].astype(pd.ArrowDtype(pa.decimal128(18, 2))),
        "pieces": kept["pieces"].astype("int64[pyarrow]"),
        "weight": kept["weight"].astype("float64[pyarrow]"),
        "city": kept["city"],
        "paid": kept["paid"] == "true",
    })  # fmt: skip
    rows.to_parquet("rows.parquet")
    text[~good].to_parquet("rejects.parquet")
    for file in ("rows.parquet", "rejects.parquet", "."):
        descriptor = os.open(Path(file), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
