# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1"]
# ///
"""JSON documents, JSON lines and GeoJSON become rows of topic `json`.

A `.json` or `.geojson` file is one document, held in memory: an array of objects is a row each;
so is an object with exactly one member that is an array of objects, whose other members are
repeated on every row as `document_<name>`; any other document is one row. A `.json` file whose
first line is a whole object and not its last is read as JSON lines, and a `.jsonl` file whose
first line is only `{` or `[` as a document. A document that is not JSON
fails the job, with the line and column.

`.jsonl`, `.ndjson` and `.geojsonl` are read line by line, twice: first for the columns, then for
the rows. A line that is not JSON, not UTF-8, or repeats a key within an object goes to topic
`json_rejects` (line from 1, reason, raw text with undecodable bytes as `\\xNN`); blank lines are
skipped.

A GeoJSON feature is a row of its properties, with its other members as `feature_<name>`. What is
not an object is a row with the one column `value`.
Each top-level key is a column. Where all values of the file agree it is boolean, int64, float64
(integers up to 2**53 may be among them) or text; a column that holds anything else, or mixes
them, is JSON text. A missing key and `null` are both null. A lone surrogate in a text stays the
escape it was (`\\udNNN`). A file with more than 1000 keys, or none, has the one column
`value`, JSON text of each row. Names: white space is folded, an empty key becomes `column_3` (its
position), keys that differ in case only `name_2`, `_cf_x` becomes `x_cf_x`; 100 characters are
kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern=["*.json", "*.geojson", "*.jsonl", "*.ndjson", "*.geojsonl"],
    topic=["json", "json_rejects"],
    version="1.0.0",
)

LINES = {".jsonl", ".ndjson", ".geojsonl"}
MAX_COLUMNS = 1000
BATCH_ROWS = 5000
BATCH_BYTES = 16 << 20
REJECTS = pa.schema([("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])

Kinds = dict[str, set[str]]
"""For each key in order of appearance, the kinds of its values in the file."""


class Entry(NamedTuple):
    """A row and about how many bytes it has, or a line and the reason why it is no row."""

    row: dict[str, Any]
    size: int
    line: int = 0
    reason: str = ""
    raw: str = ""


class Handler(BasePlugin):
    """Publishes the records of one JSON file."""

    def execute(self, file_path: str) -> None:
        entries: Callable[[], Iterator[Entry]]
        if is_lines(file_path):
            entries = partial(read_lines, file_path)
        else:
            entries = partial(iter, read_document(file_path))
        kinds: Kinds = {}
        for batch in batches(entries()):
            survey(batch, kinds)
            self.publish_rejects([entry for entry in batch if entry.reason])
        whole = not 0 < len(kinds) <= MAX_COLUMNS
        if whole:
            kinds = {"value": {"other"}}
        for batch in batches(entries()):
            rows = [entry.row for entry in batch if not entry.reason]
            if rows:
                self.publish("json", table([{"value": r} for r in rows] if whole else rows, kinds))

    def publish_rejects(self, bad: list[Entry]) -> None:
        if bad:
            rows = [(entry.line, entry.reason, entry.raw) for entry in bad]
            columns = [pa.array(column) for column in zip(*rows, strict=True)]
            self.publish("json_rejects", pa.Table.from_arrays(columns, schema=REJECTS))


def is_lines(path: str) -> bool:
    """By name, unless it is printed over many lines; else by its first line."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    if PurePath(path).suffix.lower() in LINES:
        return first.strip() not in (b"{", b"[")
    if not more:
        return False
    try:
        return isinstance(parse(first), dict)
    except ValueError:
        return False


def read_lines(path: str) -> Iterator[Entry]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Entry(row_of(parse(line.strip())), len(line))
            except ValueError as error:
                raw = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
                yield Entry({}, len(line), number, str(error).replace("line 1 ", ""), raw)


def read_document(path: str) -> list[Entry]:
    """The rows of a file that is one JSON document.

    Raises:
        ValueError: it is not JSON; the message says where.
    """
    with open(path, "rb") as file:
        data = file.read()
    document = parse(data)
    if not is_objects(document):
        inner = (
            [name for name in document if is_objects(document[name])] if is_dict(document) else []
        )
        if len(inner) != 1:
            return [Entry(row_of(document), len(data))]
        rows, outer = document.pop(inner[0]), document
    else:
        rows, outer = document, {}
    size = len(data) // len(rows) + len(json.dumps(outer))
    return [Entry(beside(row_of(row), "document_", outer), size) for row in rows]


def is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def is_objects(value: Any) -> bool:
    """A list of objects, and of at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_dict, value))


def row_of(value: Any) -> dict[str, Any]:
    """A JSON value as a row: a feature's properties, an object's members, or `value`."""
    if not isinstance(value, dict):
        return {"value": value}
    if value.get("type") != "Feature" or not is_dict(value.get("properties")):
        return value
    others = {name: value[name] for name in value if name not in ("type", "properties")}
    return beside(value["properties"], "feature_", others)


def beside(row: dict[str, Any], prefix: str, others: dict[str, Any]) -> dict[str, Any]:
    """The row and the others, whose names get the prefix until they are free."""
    whole = dict(row)
    for key, value in others.items():
        name = prefix + key
        while name in whole:
            name = prefix + name
        whole[name] = value
    return whole


def parse(data: bytes) -> Any:
    """The JSON value in these bytes.

    Raises:
        ValueError: not JSON, or not its encoding, or an object with a key twice.
    """
    try:
        return json.loads(data.decode(json.detect_encoding(data)), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding}: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return members


def survey(entries: Iterable[Entry], kinds: Kinds) -> None:
    """Add the kinds of the entries' values."""
    for entry in entries:
        for name, value in entry.row.items():
            seen = kinds.setdefault(name, set())
            if value is not None:
                seen.add(kind(value))


def kind(value: Any) -> str:
    if isinstance(value, bool | float | str):
        return type(value).__name__
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return "int" if abs(value) <= 1 << 53 else "long"
    return "other"


def table(rows: list[dict[str, Any]], kinds: Kinds) -> Any:
    """The rows as a table with the columns and types that the whole file agrees on."""
    arrays = [column([row.get(name) for row in rows], seen) for name, seen in kinds.items()]
    return pa.Table.from_arrays(arrays, names=column_names(kinds))


def column(values: list[Any], seen: set[str]) -> Any:
    if seen <= {"str"}:
        return texts(values)
    if seen <= {"bool"}:
        return pa.array(values, pa.bool_())
    if seen <= {"int", "long"}:
        return pa.array(values, pa.int64())
    if seen <= {"int", "float"}:
        return pa.array(values, pa.float64())
    return texts([value if value is None else dumps(value) for value in values])


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def texts(values: list[str | None]) -> Any:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        return pa.array([value and printable(value) for value in values], pa.string())


def batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries by some thousands, or fewer where they are long."""
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.size
        if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def column_names(cells: Iterable[str]) -> list[str]:
    """Names that every sink takes: not empty, not repeated in any case, not reserved."""
    names: list[str] = []
    seen: set[str] = set()
    for position, cell in enumerate(cells, start=1):
        base = printable(" ".join(cell.split()))[:100] or f"column_{position}"
        base = f"x{base}" if base.lower().startswith("_cf_") else base
        name, count = base, 1
        while name.casefold() in seen:
            count += 1
            name = f"{base}_{count}"
        seen.add(name.casefold())
        names.append(name)
    return names


def printable(text: str) -> str:
    """The text as Unicode that can be stored: NUL and lone surrogates are escaped."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
