# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1"]
# ///
"""JSON documents, JSON lines and GeoJSON become rows of topic `json`; gzip is unpacked.

**Records.** A `.json` or `.geojson` file is one document, which is read into memory. An array with
an object among its elements gives a row for each element; an empty array gives none. An object with
exactly one member that is such an array is a page: the array's elements are the rows, and the
object's other members are repeated on each as `document_<name>`. A page with an empty array gives
no row; an object counts as one only if the empty array has a usual name (`items`, `results`, ...)
or is the only member. Any other document is one row. Guesses are logged; option `records` replaces
them: the member's name, or `.` for the document itself.
A `.json` file is read as JSON lines if its first line is a whole value and other lines follow. A
`.jsonl` file is read as a document if its first line is only `{` or `[`. Objects that follow one
another without line ends are a row each. A document that is not JSON fails the job with the line
and column; so does a file whose first bytes are those of HTML, XML, a ZIP or another known kind. A
file of 0 bytes publishes nothing.

`.jsonl`, `.ndjson` and `.geojsonl` files are read line by line, twice: first for the columns, then
for the rows. Blank lines are skipped; a line that is an array with objects gives a row for each
element. Rejects go to topic `json_rejects` with the line (from 1; null in a document), the reason
and the raw text (invalid bytes as `\\xNN`). Rejected are lines that are not JSON, are not in the
file's encoding or repeat a key in an object; records with NaN or Infinity, which JSON does not
have; and records with a number that fits neither a double nor a decimal of 38 digits.

A GeoJSON feature is a row of its properties, with its other members as `feature_<name>`. A value
that is not an object is a row with the one column `value`.

**Columns.** Each top-level key is a column. Its type depends on all of its values in the file:

    only null             null, which is not a type yet
    true and false        boolean
    text                  text
    whole numbers         int64
    numbers               double, if the shortest text of the double nearest to each number has the
                          number's value: 0.1 and 1e3, but not 12345678901234567.89
    other numbers         decimal(38, 18), or with more digits after the point if they need them:
                          whole numbers beyond 64 bits, numbers of 17 digits and more
    numbers too long      JSON text, with a note in the log: whole numbers of more than 38 digits
    anything else         JSON text: arrays, objects, columns of mixed kinds

Numbers in JSON text stay as they were written. A missing key and `null` are both null. A lone
surrogate in a text stays an escape (`\\udNNN`). A file with more than 1000 keys, or none, has the
one column `value`, the JSON text of each row. Column names: runs of white space become one space,
an empty key becomes `column_3` (its position), keys that differ only in case `name_2`, `_cf_x`
becomes `x_cf_x`, and names are cut to 100 characters.

**Option `types`** sets the types of columns that differ from file to file. `text` makes every
column text: texts stay as they are, other values become JSON text. `double` makes every number that
is not an int64 the nearest double. `id:text,lat:double,sum:decimal` sets single columns by their
keys; `decimal` is decimal(38, 18), and a record with another value is rejected.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Context, Decimal, InvalidOperation
from functools import partial
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.sdk import (
    BasePlugin,
    PluginMetadata,
    batches,
    column_names,
    foreign_kind,
    open_bytes,
)

MANIFEST = PluginMetadata(
    pattern=[
        "*.json", "*.geojson", "*.jsonl", "*.ndjson", "*.geojsonl",
        "*.json.gz", "*.geojson.gz", "*.jsonl.gz", "*.ndjson.gz", "*.geojsonl.gz",
    ],
    topic=["json", "json_rejects"],
    version="1.1.0",
    options={"types": "", "records": ""},
)  # fmt: skip

LINES = {".jsonl", ".ndjson", ".geojsonl"}
PAGES = {
    "items", "results", "result", "data", "records", "rows", "values", "value", "features",
    "entries", "hits", "documents", "docs", "list", "objects", "elements", "content", "nodes",
    "edges", "events", "members", "messages",
}  # fmt: skip
"""Names of members that make a document a page even if their array is empty."""
MAX_COLUMNS = 1000
BLOCK = 1 << 16
LOOK = 10
"""Lines to read for telling JSON lines from a document with line breaks."""
DIGITS = 38
SCALE = 18
"""The usual number of digits after the point of decimals, so that a topic's outputs agree."""
PLAIN, ONE = Context(prec=100), Decimal(1)
REJECTS = pa.schema([("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])
BLANKS = " \t\r\n"
MARKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"
"""Bytes that may surround a brace in any encoding of JSON."""
NUMBERS = {"int", "long", "big", "huge", "float", "decimal"}
ANY = NUMBERS | {"none"}

Kinds = dict[str, set[str]]
"""For each key in order of appearance, the kinds of its values in the file."""


class Number(str):
    """The text of a number that Python would write differently."""


class Constant(str):
    """NaN, Infinity or -Infinity: some files have them, though JSON does not."""


class Entry(NamedTuple):
    """A row with its approximate size in bytes, or a reject with its reason and text."""

    row: dict[str, Any]
    size: int
    line: int | None = None
    reason: str = ""
    raw: str = ""


class Column(NamedTuple):
    """A column's type in a file."""

    type: Any
    values: Callable[[Any], Any]
    """Converts a value that is not null to one that Arrow accepts for the type."""


class Handler(BasePlugin):
    """Publishes the records of one JSON file."""

    def execute(self, file_path: str) -> None:
        with open_bytes(file_path) as file:
            start = file.read(BLOCK)
        if not start:
            return
        if kind := foreign_kind(start):
            raise ValueError(f"this is {kind}, not JSON")
        topic, rejects_topic = MANIFEST.topic
        reader = Reader(start, MANIFEST.options)
        entries = reader.entries(file_path)
        kinds: Kinds = {}
        for batch in batches(entries(), lambda entry: entry.size):
            reader.survey(batch, kinds)
            rejects = [(entry.line, entry.reason, entry.raw) for entry in batch if entry.reason]
            if rejects:
                lines, reasons, raws = zip(*rejects, strict=True)
                arrays = [pa.array(lines, pa.int64()), texts(reasons), texts(raws)]
                self.publish(rejects_topic, pa.Table.from_arrays(arrays, schema=REJECTS))
        whole = not 0 < len(kinds) <= MAX_COLUMNS
        columns = {"value": reader.json_text()} if whole else reader.columns(kinds, entries)
        for batch in batches(entries(), lambda entry: entry.size):
            rows = [entry.row for entry in batch if not entry.reason]
            if rows:
                rows = [{"value": row} for row in rows] if whole else rows
                self.publish(topic, table(rows, columns))


class Reader:
    """Reads the records of one file.

    Args:
        start: the first bytes of the file, unpacked.
        options: the MANIFEST's options.
    """

    def __init__(self, start: bytes, options: Mapping[str, Any]) -> None:
        self.encoding = encoding_of(start)
        newline = "\n".encode(self.encoding)
        self.newline = newline if newline in start else "\r".encode(self.encoding)
        if self.newline not in start:
            self.newline = newline
        self.forced, self.every = forced_types(str(options.get("types", "")))
        self.records = str(options.get("records", ""))
        self._constants = False
        """Whether the value parsed last has a Constant in it."""
        self._numbers = False
        """Whether any parsed value had a Number in it."""
        self._decoder = json.JSONDecoder(
            object_pairs_hook=unique, parse_float=self._fraction, parse_int=self._whole,
            parse_constant=self._constant,
        )  # fmt: skip

    def entries(self, path: str) -> Callable[[], Iterator[Entry]]:
        """Return a function that reads the file's entries from the beginning at each call.

        Raises:
            ValueError: the file is a document that is not JSON.
        """
        with open_bytes(path) as file:
            found = islice((line for line in self._split(file) if self._is_text(line)), LOOK)
            first, *later = [*found] or [b""]
        suffixes = [suffix.lower() for suffix in PurePath(path).suffixes if suffix.lower() != ".gz"]
        named = bool(suffixes[-1:]) and suffixes[-1] in LINES
        is_open = first.strip(MARKS) in (b"{", b"[")
        if (named and not is_open) or (not named and later and self._is_value(first)):
            return partial(self.lines, path)
        try:
            return partial(iter, self.document(path))
        except ValueError:
            # The first of damaged JSON lines may have been cut to a brace.
            if named and any(map(self._is_value, later)):
                return partial(self.lines, path)
            raise

    def lines(self, path: str) -> Iterator[Entry]:
        """The rows and rejects of a file of JSON lines."""
        with open_bytes(path) as file:
            for number, line in enumerate(self._split(file), start=1):
                if self._is_text(line):
                    yield from self._line(number, line)

    def document(self, path: str) -> list[Entry]:
        """The rows of a file that is one JSON document.

        Raises:
            ValueError: the file is not JSON; the message has the line and column.
        """
        with open_bytes(path) as file:
            data = file.read()
        if not self._is_text(data):
            print("the file has only white space: no rows")
            return []
        documents = self._values(self._decoded(data))
        if len(documents) > 1:
            print(f"the file is {len(documents)} objects one after another, each a record")
        rows, outer = (documents, {}) if len(documents) > 1 else self._records_of(documents[0])
        if self._constants and (constant := constant_in(list(outer.values()))):
            raise ValueError(f"not JSON: {constant} beside the records")
        size = len(data) // max(len(rows), 1) + len(self.dumps(outer))
        whole = [beside(row_of(row), "document_", outer) for row in rows]
        reasons = [self._reason(row) for row in whole]
        return [
            Entry(row, size, None, f"record {n}: {reason}", self.dumps(row)) if reason
            else Entry(row, size)
            for n, (row, reason) in enumerate(zip(whole, reasons, strict=True), start=1)
        ]  # fmt: skip

    def survey(self, entries: Iterable[Entry], kinds: Kinds) -> None:
        """Add the kinds of the entries' values to `kinds`."""
        for entry in entries:
            for name, value in entry.row.items() if not entry.reason else ():
                seen = kinds.setdefault(name, set())
                if value is not None:
                    seen.add(kind(value))

    def columns(self, kinds: Kinds, entries: Callable[[], Iterator[Entry]]) -> dict[str, Column]:
        """The column for each key, with a type that fits all of its values."""
        found = {name: self._column(name, seen) for name, seen in kinds.items()}
        missing = [name for name, column in found.items() if column is None]
        rooms = dict.fromkeys(missing, (0, 0))
        for entry in entries() if missing else ():
            for name in missing if not entry.reason else ():
                if (value := entry.row.get(name)) is not None:
                    pairs = zip(rooms[name], room(decimal(value)), strict=True)
                    before, after = (max(pair) for pair in pairs)
                    rooms[name] = before, after
        for name, (before, after) in rooms.items():
            scale = SCALE if 0 < after <= SCALE and before <= DIGITS - SCALE else after
            if before + after <= DIGITS:
                found[name] = Column(pa.decimal128(DIGITS, scale), plain_decimal)
            else:
                print(
                    f"guessed: column {name!r} is JSON text: its digits do not fit any number type"
                )
                found[name] = self.json_text()
        return {name: column or self.json_text() for name, column in found.items()}

    def json_text(self) -> Column:
        """A column that accepts every value."""
        return Column(pa.string(), self.dumps)

    def dumps(self, value: Any) -> str:
        """A value as JSON text."""
        if not self._numbers and not self._constants:
            try:
                return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            except RecursionError:
                pass
        return written(value)

    def _column(self, name: str, seen: set[str]) -> Column | None:
        """The column for a key; None if it needs a decimal, whose digits are not counted yet."""
        forced = self.forced.get(name, self.every)
        if forced == "text":
            return Column(pa.string(), lambda v: v if type(v) is str else self.dumps(v))
        if name in self.forced:
            if forced == "decimal":
                return Column(pa.decimal128(DIGITS, SCALE), plain_decimal)
            return Column(pa.float64(), float)
        for kinds, column in (
            (set(), Column(pa.null(), lambda v: v)),
            ({"str"}, Column(pa.string(), lambda v: v)),
            ({"bool"}, Column(pa.bool_(), lambda v: v)),
            ({"int", "long"}, Column(pa.int64(), lambda v: v)),
            (ANY if forced == "double" else {"int", "float"}, Column(pa.float64(), float)),
        ):
            if seen <= kinds:
                return column
        if seen <= NUMBERS - {"huge"}:
            return None
        if seen - {"other"}:
            listed = ", ".join(sorted(KIND_NAMES[kind] for kind in seen))
            print(f"guessed: column {name!r} is JSON text: it has {listed}")
        return self.json_text()

    def _line(self, number: int, line: bytes) -> Iterator[Entry]:
        raw = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
        try:
            values = self._values(self._decoded(line).strip(BLANKS))
        except ValueError as error:
            yield Entry({}, len(line), number, str(error).replace("line 1 ", ""), raw)
            return
        if len(values) == 1 and (is_records(values[0]) or values[0] == []):
            values = values[0]
        for row in map(row_of, values):
            size = len(line) // len(values)
            if reason := self._reason(row):
                yield Entry({}, size, number, reason, raw if len(values) == 1 else self.dumps(row))
            else:
                yield Entry(row, size)

    def _records_of(self, document: Any) -> tuple[list[Any], dict[str, Any]]:
        """The records of a document, and the members beside their array."""
        if self.records == ".":
            return [document], {}
        if self.records:
            if not isinstance(document, dict) or not isinstance(document.get(self.records), list):
                raise ValueError(
                    f"the document has no array {self.records!r}, which option records names"
                )
            return document.pop(self.records), document
        if document == [] or is_records(document):
            return document, {}
        if not isinstance(document, dict) or document.get("type") == "Feature":
            return [document], {}
        inner = [name for name in document if is_records(document[name])]
        if not inner:
            inner = [
                name
                for name, value in document.items()
                if value == [] and (name.casefold() in PAGES or len(document) == 1)
            ]
        if len(inner) > 1:
            names = ", ".join(map(repr, inner[:5]))
            print(f"guessed: the document is one record: its members {names} are arrays of records")
        if len(inner) != 1:
            return [document], {}
        rows = document.pop(inner[0])
        print(
            f"guessed: the document is a page: its records are the {len(rows)} elements of its "
            f"member {inner[0]!r}; --option records=. makes the document one record"
        )
        return rows, document

    def _reason(self, row: Mapping[str, Any]) -> str:
        """The reason to reject a record; empty if it can be a row."""
        if self._constants and (constant := constant_in(list(row.values()))):
            name = next(name for name, value in row.items() if constant_in([value]))
            return f"{constant} is not a JSON number: {name!r}"
        for name, forced in self.forced.items():
            value = row.get(name)
            if forced == "text" or value is None:
                continue
            if kind(value) not in ANY:
                return f"{name!r} is {KIND_NAMES[kind(value)]}; option types says {forced}"
            if not (is_double(value) if forced == "double" else has_room(value)):
                return f"{name!r} is {str(value)[:60]}, which does not fit a {forced}"
        for name, value in row.items() if self._numbers and self.every != "text" else ():
            if not isinstance(value, Number) or name in self.forced:
                continue
            if self.every == "double" and not is_double(value):
                return f"{name!r} is {value[:60]}, which does not fit a double"
            if not self.every and kind(value) == "none":
                return (
                    f"{name!r} is {value[:60]}, which fits neither a double nor a decimal of "
                    f"{DIGITS} digits"
                )
        return ""

    def _is_value(self, line: bytes) -> bool:
        try:
            self._values(self._decoded(line).strip(BLANKS))
        except ValueError:
            return False
        return True

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode(self.encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            message = f"not {error.encoding}: {error.reason} at byte {error.start}"
            raise ValueError(message) from error

    def _is_text(self, data: bytes) -> bool:
        """Whether the bytes have more than white space."""
        if self.encoding != "utf-8":
            return bool(data.decode(self.encoding, "replace").strip(BLANKS + "\ufeff"))
        return bool(data.removeprefix(b"\xef\xbb\xbf").strip())

    def _values(self, text: str) -> list[Any]:
        """The JSON value in a text, or several if they are objects one after another.

        Raises:
            ValueError: as `_parse`.
        """
        try:
            return [self._parse(text)]
        except ValueError as error:
            if "Extra data" not in str(error):
                raise
            values, at = [], 0
            text = text.strip(BLANKS)
            while at < len(text):
                try:
                    value, at = self._decoder.raw_decode(text, at)
                except (ValueError, RecursionError):
                    raise error from None
                if not isinstance(value, dict):
                    raise
                values.append(value)
                while text[at : at + 1] in BLANKS and at < len(text):
                    at += 1
            return values

    def _parse(self, text: str) -> Any:
        """The JSON value in a text.

        Raises:
            ValueError: the text is not JSON, or an object has a key twice.
        """
        self._constants = False
        try:
            return self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from error
        except RecursionError as error:
            raise ValueError("nested too deeply") from error

    def _split(self, file: Any) -> Iterator[bytes]:
        """The lines of a file, each with its line end."""
        if self.newline == b"\n":
            yield from file
            return
        width = len(self.newline)
        rest = bytearray()
        while block := file.read(BLOCK):
            start, at = 0, max(len(rest) - width, 0)
            rest += block
            while (at := rest.find(self.newline, at)) >= 0:
                if at % width:  # a match across two characters
                    at += 1
                    continue
                at += width
                yield bytes(rest[start:at])
                start = at
            del rest[:start]
        if rest:
            yield bytes(rest)

    def _fraction(self, text: str) -> float | Number:
        value = float(text)
        if repr(value) == text:
            return value
        self._numbers = True
        return Number(text)

    def _whole(self, text: str) -> int | Number:
        if len(text) <= DIGITS:
            return int(text)
        self._numbers = True
        return Number(text)

    def _constant(self, text: str) -> Constant:
        self._constants = True
        return Constant(text)


KIND_NAMES = {
    "bool": "true or false", "str": "text", "other": "arrays or objects",
    **dict.fromkeys(ANY, "numbers"), "huge": "whole numbers of more than 38 digits",
}  # fmt: skip


def forced_types(option: str) -> tuple[dict[str, str], str]:
    """Parse option `types`: the types by key, and the type for all other columns.

    Raises:
        ValueError: the option is invalid.
    """
    forced: dict[str, str] = {}
    every = ""
    for choice in filter(None, option.split(",")):
        name, colon, wanted = choice.rpartition(":")
        known = {"text", "double", "decimal"} if colon else {"text", "double"}
        if wanted not in known:
            raise ValueError(
                f"option types has {choice!r}: write text, double, or KEY:text, KEY:double, "
                "KEY:decimal, with commas between them"
            )
        if colon:
            forced[name] = wanted
        else:
            every = wanted
    return forced, every


def encoding_of(start: bytes) -> str:
    """The encoding of JSON, from its byte order mark or from zeros beside its first character.

    Without a mark, the start must also be plausible text in that encoding.
    """
    found = json.detect_encoding(start[:4])
    if found in ("utf-8", "utf-8-sig"):
        return "utf-8"
    if found in ("utf-16", "utf-32"):  # there is a mark, which gives the byte order
        return found + ("-le" if start[:1] == b"\xff" else "-be")
    try:
        text = codecs.getincrementaldecoder(found)().decode(start)
    except UnicodeDecodeError:
        return "utf-8"
    controls = sum(char < " " and char not in BLANKS for char in text)
    ascii_share = sum(char.isascii() for char in text) / max(len(text), 1)
    return found if not controls and ascii_share > 0.2 else "utf-8"


def is_records(value: Any) -> bool:
    """Whether a value is a list with an object among its elements."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def row_of(value: Any) -> dict[str, Any]:
    """A JSON value as a row: a feature's properties, an object's members, or `value`."""
    if not isinstance(value, dict):
        return {"value": value}
    if value.get("type") != "Feature" or not isinstance(value.get("properties"), dict):
        return value
    others = {name: value[name] for name in value if name not in ("type", "properties")}
    return beside(value["properties"], "feature_", others)


def beside(row: dict[str, Any], prefix: str, others: dict[str, Any]) -> dict[str, Any]:
    """Add other members to a row, with the prefix (repeated if a name is taken)."""
    whole = dict(row)
    for key, value in others.items():
        name = prefix + key
        while name in whole:
            name = prefix + name
        whole[name] = value
    return whole


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return members


def constant_in(values: list[Any]) -> str:
    """A Constant in values, at any depth; empty if there is none."""
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, Constant):
            return str(value)
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    return ""


def kind(value: Any) -> str:
    """The kind of a value that is not null, from which its column's type is chosen."""
    if isinstance(value, Number):
        return kind_of_number(value)
    if isinstance(value, bool | float | str):
        return type(value).__name__
    if isinstance(value, int):
        if -(1 << 53) <= value <= 1 << 53:
            return "int"
        if not -(1 << 63) <= value < 1 << 63:
            return "big"
        near = float(value)
        return "int" if int(near) == value == Decimal(repr(near)) else "long"
    return "other"


def kind_of_number(text: Number) -> str:
    """The kind of a number: `float` if the shortest text of the nearest double has the same value,
    `none` if no number type holds it."""
    if text.lstrip("-").isdigit():
        return "big" if len(text.lstrip("-")) <= DIGITS else "huge"
    try:
        exact = Decimal(text)
    except InvalidOperation:  # an exponent of twenty digits
        return "none"
    nearest = float(text)
    if math.isfinite(nearest) and Decimal(repr(nearest)) == exact:
        return "float"
    return "decimal" if sum(room(exact)) <= DIGITS else "none"


def decimal(value: Any) -> Decimal:
    """A number as the decimal with the same digits."""
    return Decimal(repr(value) if isinstance(value, float) else value)


def plain_decimal(value: Any) -> Decimal:
    """A number as a decimal without exponent and trailing zeros, as Arrow requires."""
    exact = PLAIN.normalize(decimal(value))
    exponent = exact.as_tuple().exponent
    return exact if isinstance(exponent, int) and exponent <= 0 else PLAIN.quantize(exact, ONE)


def room(value: Decimal) -> tuple[int, int]:
    """How many digits a number needs before the point, and after it."""
    _, digits, exponent = value.as_tuple()
    if not any(digits) or not isinstance(exponent, int):
        return 0, 0
    last = max(n for n, digit in enumerate(digits) if digit)
    exponent += len(digits) - 1 - last
    return max(last + 1 + exponent, 0), max(-exponent, 0)


def has_room(value: Any) -> bool:
    """Whether decimal(38, 18) holds a number."""
    try:
        before, after = room(decimal(value))
    except InvalidOperation:
        return False
    return before <= DIGITS - SCALE and after <= SCALE


def is_double(value: Any) -> bool:
    """Whether a number has a nearest double."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def written(value: Any) -> str:
    """JSON text with Numbers and Constants as they were written; values may nest deeply."""
    out: list[str] = []
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Number | Constant):
            out.append(item)
        elif isinstance(item, dict | list):
            todo += reversed(list(pieces(item)))
        else:
            out.append(json.dumps(item, ensure_ascii=False))
    return "".join(out)


def pieces(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    """The members of an object or array; the punctuation between them as Number."""
    comma = ""
    if isinstance(value, dict):
        yield Number("{")
        for name, member in value.items():
            yield Number(f"{comma}{json.dumps(name, ensure_ascii=False)}:")
            yield member
            comma = ","
        yield Number("}")
        return
    yield Number("[")
    for member in value:
        yield Number(comma)
        yield member
        comma = ","
    yield Number("]")


def table(rows: list[dict[str, Any]], columns: Mapping[str, Column]) -> Any:
    """The rows as a table of these columns."""
    arrays = []
    for name, (type_, values) in columns.items():
        found = [None if (v := row.get(name)) is None else values(v) for row in rows]
        arrays.append(texts(found) if type_ == pa.string() else pa.array(found, type_))
    return pa.Table.from_arrays(arrays, names=column_names(columns))


def texts(values: Iterable[str | None]) -> Any:
    """An Arrow array of texts; lone surrogates, which Arrow cannot hold, become escapes."""
    values = list(values)
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        escaped = [v and v.encode("utf-8", "backslashreplace").decode("utf-8") for v in values]
        return pa.array(escaped, pa.string())
