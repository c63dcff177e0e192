"""Random JSON, written and read back: what `plugins/json_records.py` publishes is what was written.

python -m proofs.written_json --count 5000 --seed 1
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.sdk import column_names
from proofs import arguments

Run = Callable[[Path], dict[str, pa.Table]]

TEXTS = [
    "", "x", "A7", "10", "1e400", "null", "NaN", "naïve", "שלום", "🐟", 'q"uote', "back\\slash",
    "a\nb", "\0", "\ud800", "x\udfff!", "\u2028", "\\ud800", " padded ",
    "\ufeff", "2020/05/11", "\x1e",
]  # fmt: skip
KEYS = [
    "id",
    "price",
    "note",
    "",
    " a  b ",
    "ID",
    "_cf_job_id",
    "é",
    "value",
    "x" * 120,
    "\ud801",
    "n",
]


class Token(NamedTuple):
    """A number as it is written."""

    text: str


class Tally(NamedTuple):
    """What was written, all of it found again."""

    rows: int
    rejects: int
    values: int


def number(rng: random.Random, family: str) -> Any:
    """A number of a family, as Python writes it or as somebody else might."""
    match family:
        case "ints":
            return rng.choice([0, 1, -1, rng.randrange(-(10**6), 10**6), 2**53, -(2**53)])
        case "longs":
            return rng.choice([2**53 + 1, 2**63 - 1, -(2**63), 2**60, rng.getrandbits(62), 7])
        case "bigs":
            return rng.choice([2**63, 2**64, -(10**37), 10**38 - 1, rng.getrandbits(120)])
        case "huges":
            return Token("-" * rng.randrange(2) + "1" + str(rng.getrandbits(160)).zfill(50))
        case "floats":
            return rng.choice(
                [rng.random(), rng.gauss(0, 1e6), 0.5, -0.0, 1e300, 5e-324, 1e22, 2.0]
            )
        case "digits":
            return Token(f"{rng.gauss(0, 100):.17g}")
        case "cents":
            return Token(f"{rng.randrange(10**6)}.{rng.randrange(100):02}")
        case "exponents":
            shown = rng.choice(["1e3", "1E+2", "1.50e-2", "-0e5", "0.0e99", "12e0", "100.000"])
            return Token(shown)
        case _:
            return Token(rng.choice(["1e400", "-1e400", "1e-400", "12345678901234567.89", "0.1"]))


FAMILIES = ["ints", "longs", "bigs", "huges", "floats", "digits", "cents", "exponents", "beyond"]


def value(rng: random.Random, families: list[str], depth: int = 0) -> Any:
    """A value of one of these families."""
    family = rng.choice(families)
    if family in FAMILIES:
        return number(rng, family)
    if family == "texts":
        return rng.choice(TEXTS)
    if family == "bools":
        return rng.random() < 0.5
    if family == "nested" and depth < 3:
        some = [value(rng, [*FAMILIES, "texts", "bools", "nested", "nulls"], depth + 1)
                for _ in range(rng.randrange(4))]  # fmt: skip
        return some if rng.random() < 0.5 else dict(zip(TEXTS[1:], some, strict=False))
    return None


def records(rng: random.Random) -> list[dict[str, Any]]:
    """Records of some columns; a column is of one family, of numbers, or of anything."""
    columns = {}
    for key in rng.sample(KEYS, rng.randrange(1, 6)):
        kind = rng.random()
        if kind < 0.6:
            columns[key] = [rng.choice([*FAMILIES, "texts", "bools", "nested", "nulls"])]
        elif kind < 0.9:
            columns[key] = rng.sample(FAMILIES, 2)
        else:
            columns[key] = rng.sample([*FAMILIES, "texts", "bools", "nested"], 3)
    missing, nulls = rng.choice([0, 0.2]), rng.choice([0, 0.2])
    found = [
        {
            key: None if rng.random() < nulls else value(rng, families)
            for key, families in columns.items()
            if rng.random() >= missing
        }
        for _ in range(rng.choice([1, 2, 5, 30]))
    ]
    if rng.random() < 0.1:
        rng.choice(found)["n"] = rng.choice([float("nan"), [float("-inf")]])
    return found


def text_of(rng: random.Random, item: Any) -> str:
    """JSON text, in one of the ways of writing it."""
    blank = rng.choice(["", "", " ", "\t"])
    if isinstance(item, Token):
        return item.text
    if isinstance(item, dict):
        members = (
            f"{text_of(rng, key)}{blank}:{blank}{text_of(rng, member)}"
            for key, member in item.items()
        )
        return "{" + f"{blank},{blank}".join(members) + "}"
    if isinstance(item, list):
        return "[" + f",{blank}".join(text_of(rng, each) for each in item) + "]"
    lone = isinstance(item, str) and any("\ud800" <= char <= "\udfff" for char in item)
    return json.dumps(item, ensure_ascii=lone or rng.random() < 0.5)


def exact(item: Any) -> Any:
    """What was written, with every number as a decimal that can be compared."""
    if isinstance(item, dict):
        return {key: exact(member) for key, member in item.items()}
    if isinstance(item, list):
        return [exact(each) for each in item]
    if isinstance(item, Token):
        return Decimal(item.text)
    if isinstance(item, int | float) and not isinstance(item, bool):
        return Decimal(repr(item))
    return item


def loads(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def is_same(cell: Any, item: Any) -> bool:
    """Whether a cell has the value that was written, in its own type or as JSON text."""
    want = exact(item)
    if cell is None or want is None:
        return cell is want
    if isinstance(want, bool):
        return cell is want or cell == json.dumps(want)
    if isinstance(want, Decimal):
        if isinstance(cell, str):
            return bool(Decimal(cell) == want)
        return not isinstance(cell, bool) and bool(Decimal(repr(cell) if isinstance(cell, float)
                                                           else cell) == want)  # fmt: skip
    if isinstance(want, str):
        plain = want.encode("utf-8", "backslashreplace").decode()
        return isinstance(cell, str) and (
            cell == plain or (cell[:1] == '"' and loads(cell) == want)
        )
    return isinstance(cell, str) and bool(loads(cell) == want)


def has_constant(item: Any) -> bool:
    if isinstance(item, dict):
        return any(map(has_constant, item.values()))
    if isinstance(item, list):
        return any(map(has_constant, item))
    return isinstance(item, float) and (item != item or item in (float("inf"), float("-inf")))


def no_number_holds(item: Any) -> bool:
    """Whether neither a double nor a decimal of 38 digits has the value; whole numbers aside."""
    if not isinstance(item, Token) or item.text.lstrip("-").isdigit():
        return False
    want = Decimal(item.text)
    if Decimal(repr(float(item.text))) == want:
        return False
    _, digits, exponent = want.normalize().as_tuple()
    assert isinstance(exponent, int)
    return max(len(digits) + exponent, 0) + max(-exponent, 0) > 38


def is_refused(record: dict[str, Any]) -> bool:
    return has_constant(record) or any(map(no_number_holds, record.values()))


def compare(out: dict[str, pa.Table], written: list[dict[str, Any]]) -> Tally:
    """The published tables against what was written, value by value.

    Raises:
        AssertionError: a value, a row or a reject is not what it should be.
    """
    good = [record for record in written if not is_refused(record)]
    rejects = out["json_rejects"].num_rows if "json_rejects" in out else 0
    assert rejects == len(written) - len(good), (rejects, len(written) - len(good))
    rows = out["json"].to_pylist() if "json" in out else []
    assert len(rows) == len(good), (len(rows), len(good))
    keys = list(dict.fromkeys(key for record in good for key in record))
    if not keys:
        assert all(row == {"value": "{}"} for row in rows)
        return Tally(len(rows), rejects, len(rows))
    names = column_names(keys)
    if rows:
        assert out["json"].column_names == names
    for row, record in zip(rows, good, strict=True):
        for key, name in zip(keys, names, strict=True):
            assert is_same(row[name], record.get(key)), (key, row[name], record.get(key))
    return Tally(len(rows), rejects, len(rows) * len(keys))


def store(rng: random.Random, path: Path, data: bytes) -> Path:
    """The bytes in a file, packed or not."""
    if rng.random() < 0.3:
        path = path.with_name(path.name + rng.choice(["", ".gz"]))
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)
    return path


def check_document(seed: int, folder: Path, run: Run) -> Tally:
    """Write one document, read it with the plugin, compare."""
    rng = random.Random(seed)
    written = records(rng)
    text = text_of(rng, written)
    if rng.random() < 0.3:
        text = text.replace("\t", "\n")
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
    path = store(rng, folder / f"{seed}.json", text.encode(encoding))
    return compare(run(path), written)


def check_lines(seed: int, folder: Path, run: Run) -> Tally:
    """Write JSON lines, some of them in arrays, read them with the plugin, compare."""
    rng = random.Random(seed)
    written = records(rng)
    lines, rest = [], list(written)
    while rest:
        count = rng.choice([0, 1, 1, 1, 2])
        some, rest = rest[:count], rest[count:]
        shown = some[0] if count == 1 else some
        lines += [text_of(rng, shown), *[""] * rng.choice([0, 0, 1])]
    end = rng.choice(["\n", "\n", "\r\n", "\r"])
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
    text = end.join(lines) + end * rng.randrange(2)
    path = store(rng, folder / f"{seed}.jsonl", text.encode(encoding))
    return compare(run(path), written)


def check_damaged(seed: int, folder: Path, run: Run) -> Tally:
    """Damage lines: each is a row or a reject all the same, and the others are what they were."""
    rng = random.Random(seed)
    written = [{"n": n, "t": rng.choice(TEXTS[2:9])} for n in range(rng.randrange(1, 40))]
    lines = [json.dumps(record).encode() for record in written]
    damaged = {n for n in range(len(lines)) if rng.random() < 0.3}
    for n in damaged:
        at = rng.randrange(2, len(lines[n]))  # a brace alone may begin a document
        harm = rng.choice([b"\xff", b"\0", b'"', b"}", b"{", b"\\", b",", b"NaN"])
        lines[n] = rng.choice([lines[n][:at], lines[n][:at] + harm + lines[n][at:], lines[n] * 2])
    path = store(rng, folder / f"{seed}.ndjson", b"\n".join(lines) + b"\n")
    out = run(path)
    bad = out["json_rejects"].to_pylist() if "json_rejects" in out else []
    rows = out["json"].to_pylist() if "json" in out else []
    twice = sum(lines[n].count(b'{"n": ') == 2 for n in damaged)
    assert len(lines) <= len(rows) + len(bad) <= len(lines) + twice
    refused = {reject["line"] - 1 for reject in bad}
    assert refused <= damaged
    assert len(refused) == len(bad)
    shown = [(str(row.get("n")), row.get("t")) for row in rows]
    for n in set(range(len(lines))) - damaged:
        assert (str(n), written[n]["t"]) in shown, (n, written[n], shown)
    for reject in bad:
        assert reject["raw"] == lines[reject["line"] - 1].decode("utf-8", "backslashreplace")
    return Tally(len(rows), len(bad), len(rows) * 2)


CHECKS = [check_document, check_lines, check_damaged]


def check(seed: int, folder: Path, run: Run) -> Tally:
    """One of the checks, by the seed."""
    try:
        return CHECKS[seed % len(CHECKS)](seed, folder, run)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


def main() -> None:
    from tests.plugins.conftest import runner

    parser = arguments.parser("written_json", __doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    run = runner("json_records")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        found = [check(asked.seed + n, Path(folder), run) for n in range(asked.count)]
    rows, rejects, values = (sum(each) for each in zip(*found, strict=True))
    print(f"{asked.count} files from seed {asked.seed}: {rows} rows, {rejects} rejects, "
          f"{values} values; all as written")  # fmt: skip


if __name__ == "__main__":
    main()
