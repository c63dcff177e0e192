"""Random tables, written by others in any of their dialects, and what the plugin makes of them.

    python -m proofs.written_tables --count 5000 [--seed N]

What is published must be what was written, cell by cell, without a reject. Where a dialect leaves
open what was written, the table is read with the plugin's option that settles it; each such place
says so below. Every fifth table is damaged besides, and each of its lines must then be in a row or
in a reject.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa

from casparian_flow.sdk import column_names
from proofs import arguments
from tests.plugins.conftest import Run, load, running

Rows = list[list[str]]

WORDS = ["alpha", "Beta", "straße", "Ünal", "中文", "данные", "x", "y", "7", "42", "-3.5", "1,5",
         "2024-03-01", "12:30", "N/A", "NULL", "true"]  # fmt: skip
PIECES = [*WORDS, *" .-_/()=?!%&+*@$'<>[]{}", "\t", ",", ";", "|", "^", "~", ":", "\x01", "\x1f",
          '"', '""', "\\", "\\\\", "\\N", "C:\\temp", "\n", "\r\n", "\r", "#", "\u2028", "\x85",
          "\x0b", "\x1c", "😀", "é", "  ", "||", "::"]  # fmt: skip
SINGLE = [",", ";", "\t", "|", "^", "~", "\x01", "\x1f", ":", " "]
LONG = ["||", "::", "~~", "|~|"]
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "cp1252",
             "latin-1", "cp1251", "shift_jis", "gb18030"]  # fmt: skip


class Written(NamedTuple):
    """A table and its text in some dialect, and what the plugin has to be told of that."""

    names: list[str]
    rows: Rows
    text: str
    delimiter: str
    options: dict[str, str]
    how: str


def random_cell(rng: random.Random, plain: bool) -> str:
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.3:
        return str(rng.choice([rng.randint(-999, 99999), round(rng.uniform(-9, 9), 3)]))
    if plain or kind < 0.6:
        return " ".join(rng.choices(WORDS[:7], k=rng.randint(1, 3)))
    return "".join(rng.choices(PIECES, k=rng.randint(1, 6)))


def random_table(rng: random.Random) -> tuple[list[str], Rows]:
    """Names and rows: plain ones that people have, and odd ones."""
    plain = rng.random() < 0.4
    width = rng.choice([1, 2, 2, 3, 3, 4, 5, 8, 30])
    names = [random_cell(rng, plain) for _ in range(width)]
    # What begins like JSON or a web page is taken for that.
    names[0] = names[0].lstrip("[{<")
    height = rng.choice([0, 1, 2, 3, 5, 10, 40, 200])
    rows = [[random_cell(rng, plain) for _ in range(width)] for _ in range(height)]
    # A row like the header is the header again, and a reject.
    return names, [row for row in rows if row != names]


def without(names: list[str], rows: Rows, text: str) -> tuple[list[str], Rows]:
    """The table without some characters."""
    table = str.maketrans("", "", text)
    return [name.translate(table) for name in names], [
        [cell.translate(table) for cell in row] for row in rows
    ]


def quoting_of(rng: random.Random) -> tuple[dict[str, object], dict[str, str]]:
    """Arguments for the csv module, and the options for the plugin."""
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    quote = rng.choice(['"', '"', '"', "'"])
    # An apostrophe is text unless a person says otherwise.
    options = {} if quote == '"' else {"quote": quote}
    escape = None
    if rng.random() < 0.3:
        # `a\"b` without quotes around it reads well as it stands, and other escapes always do.
        escape = options["escape"] = rng.choice(["\\", "\\", "!", "@"])
    end = rng.choice(["\n", "\r\n", "\r"])
    if quoting == csv.QUOTE_MINIMAL:
        # Python 3.11 quotes only the line end that it writes, and leaves the other one bare.
        end = "\r\n"
    said = {"quoting": quoting, "quotechar": quote, "doublequote": not escape,
            "escapechar": escape, "lineterminator": end}  # fmt: skip
    return said, options


def by_csv(rng: random.Random, names: list[str], rows: Rows) -> Written:
    delimiter = rng.choice(SINGLE)
    said, options = quoting_of(rng)
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, **said).writerows([names, *rows])  # type: ignore[arg-type]
    return Written(names, rows, file.getvalue(), delimiter, options, f"csv {delimiter!r} {said}")


def by_csv_without_quotes(rng: random.Random, names: list[str], rows: Rows) -> Written:
    """Nothing in the text says that a character before a delimiter is an escape.

    A CR at the end of a field cannot be told from a line end, and there are no quotes that could
    stand for a record of one empty field.
    """
    delimiter = rng.choice(SINGLE)
    escape = rng.choice(["\\", "!", "@"])
    names, rows = without(names, rows, "\r")
    if len(names) == 1:
        names, rows = [names[0] or "x"], [[row[0] or "x"] for row in rows]
    file = io.StringIO()
    csv.writer(
        file, delimiter=delimiter, quoting=csv.QUOTE_NONE, escapechar=escape, lineterminator="\n"
    ).writerows([names, *rows])
    options = {"quote": "none", "escape": escape}
    how = f"csv {delimiter!r} QUOTE_NONE {escape}"
    return Written(names, rows, file.getvalue(), delimiter, options, how)


def by_pandas(rng: random.Random, names: list[str], rows: Rows) -> Written:
    delimiter = rng.choice(SINGLE)
    said, options = quoting_of(rng)
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    text = frame.to_csv(index=False, sep=delimiter, **said)
    return Written(names, rows, text, delimiter, options, f"pandas {delimiter!r} {said}")


def by_duckdb(rng: random.Random, names: list[str], rows: Rows) -> Written:
    delimiter = rng.choice([*SINGLE, *LONG])
    names = column_names(names)
    quote = rng.choice(['"', '"', "'"])
    escape = rng.choice([quote, quote, "\\"])
    null = "" if len(names) > 1 and rng.random() < 0.5 else "none"
    force = rng.random() < 0.3
    if len(delimiter) > 1 and not force:
        # `a|` before `||` cannot be told from `|a` after it.
        names, rows = without(names, rows, delimiter)
        names = column_names(names)
    if len(names) == 1:  # an empty cell becomes an empty line, which is no record
        rows = [[row[0] or "x"] for row in rows]
    options = {} if quote == '"' else {"quote": quote}
    if escape == "\\":
        # DuckDB escapes between quotes alone: `a\\b` outside of them is what it is.
        options["escape"] = "in_quotes"
    cells = [[None if cell == "N/A" else cell for cell in row] for row in rows]
    rows = [[null if cell is None else cell for cell in row] for row in cells]
    columns = [pa.array([row[i] for row in cells], pa.string()) for i in range(len(names))]
    table = pa.Table.from_arrays(columns, names=names)
    said = ", ".join(["header", f"delim {sql(delimiter)}", f"quote {sql(quote)}",
                      f"escape {sql(escape)}", f"nullstr {sql(null)}",
                      *(["force_quote *"] if force else [])])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        file = Path(folder, "table.csv")
        connection.register("written", table)
        connection.execute(f"COPY (FROM written) TO {sql(str(file))} ({said})")
        text = file.read_bytes().decode()
    return Written(names, rows, text, delimiter, options, f"DuckDB {said}")


def sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def by_polars(rng: random.Random, names: list[str], rows: Rows) -> Written:
    delimiter = rng.choice(SINGLE)
    names = column_names(names)
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    style = rng.choice(["necessary", "always", "non_numeric"])
    end = rng.choice(["\n", "\r\n"])
    text = frame.write_csv(separator=delimiter, quote_style=style, line_terminator=end)  # type: ignore[call-overload]
    return Written(names, rows, text, delimiter, {}, f"polars {delimiter!r} {style} {end!r}")


WRITERS: list[Callable[[random.Random, list[str], Rows], Written]] = [
    by_csv, by_csv, by_csv_without_quotes, by_pandas, by_duckdb, by_polars
]  # fmt: skip


def settled(written: Written) -> dict[str, str]:
    """The options without which a table in this dialect may as well be another one."""
    options = dict(written.options)
    weak = written.delimiter in " :"  # found only in tables of three columns and records
    few = len(written.rows) < 3  # one or two records can be cut in many ways
    if len(written.names) == 1 or weak or few or reads_otherwise(written):
        options["delimiter"] = written.delimiter
    # Names that look like data, or are hardly there, may be a row or a title.
    data = [name for name in written.names if re.match(r"[\d+\-.,$(\s]", name)]
    blank = [name for name in written.names if not name.strip()]
    # So may names that come again and again as a row.
    again = written.rows.count(written.names) > 1
    if data or again or len(blank) * 2 >= len(written.names) or written.names[0][:1] == "#":
        options["header_line"] = "1"
    return options


def reads_otherwise(written: Written) -> bool:
    """Whether another delimiter cuts every record into one number of fields, too."""
    quote, escape = written.options.get("quote", '"'), written.options.get("escape", "")
    for delimiter in {*SINGLE, *re.findall(r"[^\w\s\"',;]{2,4}", written.text)} - {
        written.delimiter
    }:
        if len(delimiter) > 1:
            counts = {line.count(delimiter) for line in written.text.splitlines()}
        else:
            reader = csv.reader(
                io.StringIO(written.text, newline=""),
                delimiter=delimiter,
                quotechar=quote if len(quote) == 1 else None,
                quoting=csv.QUOTE_MINIMAL if len(quote) == 1 else csv.QUOTE_NONE,
                escapechar=escape if len(escape) == 1 else None,
            )
            counts = {len(row) - 1 for row in reader if row}
        if len(counts) == 1 and counts != {0}:
            return True
    return False


class Reader:
    """The plugin with options of a table's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._module = load("delimited")
        self._usual = dict(self._module.MANIFEST.options)
        self._run: Run = running(self._module)

    def read(self, data: bytes, name: str, options: dict[str, str]) -> dict[str, pa.Table]:
        file = self._folder / name
        file.write_bytes(data)
        self._module.MANIFEST.options.update(self._usual | options)
        return self._run(file)


def check_written(rng: random.Random, reader: Reader) -> str:
    """Write and read one table, and say how it was written.

    Raises:
        AssertionError: it is not what was written.
    """
    written = rng.choice(WRITERS)(rng, *random_table(rng))
    options = settled(written)
    encoding = rng.choice(ENCODINGS)
    try:
        data = written.text.encode(encoding)
    except UnicodeEncodeError:
        encoding, data = "utf-8", written.text.encode()
    if not encoding.startswith("utf-8") and encoding not in ("utf-16", "utf-32"):
        # Without a mark, bytes alone do not say which of these it is.
        options["encoding"] = encoding
    name = {"\t": "t.tsv", "|": "t.psv"}.get(written.delimiter, "t.csv")
    if rng.random() < 0.1:
        name, data = f"{name}.gz", gzip.compress(data)
    how = f"{written.how} in {encoding} with {options}"
    try:
        out = reader.read(data, name, options)
        assert out.keys() == {"delimited"}, out.get("delimited_rejects", out)
        assert out["delimited"].column_names == column_names(written.names)
        found = [list(row.values()) for row in out["delimited"].to_pylist()]
        assert found == written.rows
    except (AssertionError, ValueError) as error:
        raise AssertionError(f"{how}\n{written.text[:2000]!r}\n{error}") from error
    return how


def check_damaged(rng: random.Random, reader: Reader) -> None:
    """Damage lines of a table: each is in a row or in a reject, and the others' rows are there.

    The count of lines is taken from the text; a row or a reject of several lines tells how many.
    """
    delimiter = rng.choice([",", ";", "\t", "|"])
    names = ["id", "name", "note", "amount", "city"][: rng.randint(2, 5)]
    rows = [
        [str(i), *(rng.choice(["straße", "", "a, b; c|d\te", "x", "4.50"]) for _ in names[1:])]
        for i in range(rng.randint(20, 300))
    ]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([names, *rows])
    lines = file.getvalue().encode().splitlines(keepends=True)
    added = {
        "cut": b"", "extra": delimiter.encode(), "nul": b"\0", "byte": b"\xff", "quote": b'"'
    }  # fmt: skip
    open_quotes = 0
    for number in rng.sample(range(1, len(lines)), k=rng.randint(1, len(rows) // 5)):
        kind = rng.choice(list(added))
        line = lines[number][:-1]
        place = rng.randint(0, len(line))
        damaged = line[:place] + added[kind] + (b"" if kind == "cut" else line[place:])
        if damaged.count(b'"') % 2:
            open_quotes += 1
            if open_quotes > 1:  # two enclose all that is between, for every reader
                continue
        lines[number], rows[number - 1] = damaged + b"\n", []
    data = b"".join(lines)
    name = "d.tsv" if delimiter == "\t" else "d.csv"
    out = reader.read(data, name, {"encoding": "utf-8", "header_line": "1"})
    found = [tuple(row.values()) for row in out["delimited"].to_pylist()]
    rejects = out["delimited_rejects"].to_pylist() if "delimited_rejects" in out else []
    assert all(row["reason"] and row["line"] for row in rejects)
    accounted = sum(1 + "".join(row).count("\n") for row in found)
    accounted += sum(row["raw"].count("\n") for row in rejects)
    assert accounted == sum(line != b"\n" for line in lines[1:]), data
    lost = Counter(tuple(row) for row in rows if row) - Counter(found)
    assert not lost, (lost, data)


def main() -> None:
    parser = arguments.parser("written_tables", __doc__)
    parser.add_argument("--count", type=int, default=5000)
    arguments.add_seed(parser)
    options = parser.parse_args()
    failed = run(options.count, options.seed)
    print(f"seed {options.seed}: {options.count} tables, {len(failed)} wrong")
    print(*failed[:5], sep="\n\n")
    sys.exit(bool(failed))


def run(count: int, seed: int) -> list[str]:
    """What went wrong in so many tables, each with the seed of its own."""
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(Path(folder))
        for number in range(count):
            rng = random.Random(f"{seed}/{number}")
            try:
                check_written(rng, reader)
                if number % 5 == 0:
                    check_damaged(rng, reader)
            except AssertionError as error:
                failed.append(f"{seed}/{number}: {error}")
    return failed


if __name__ == "__main__":
    main()
