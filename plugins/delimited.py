# /// script
# requires-python = ">=3.11"
# dependencies = ["chardet>=7.7", "clevercsv>=0.8.5", "pyarrow>=23.0.1"]
# ///
"""Delimited text (CSV, TSV, semicolons, pipes; any encoding; also gzipped) becomes a table of text.

The first record is the header; every other one is a row of topic `delimited` or of topic
`delimited_rejects`, never neither. Values stay the text they are: no type is guessed, an empty
field is an empty string. Lines without a single character are no records, as for `csv.reader`.

A record goes to `delimited_rejects` (line, record, reason, raw) when it has another number of
fields than the header, when its quotes do not close or are followed by more text, when a field
has more than 16 Mi characters, or when it holds a NUL or bytes that the file's encoding does not
know. `line` is the physical line where the record starts, `record` counts records, both from 1
with the header as record 1; `raw` is its text, with `\\x00` for NUL and `\\udcNN` for an
undecodable byte NN. A file whose header cannot be read fails; an empty file publishes nothing.

The encoding is what the byte order mark says, else UTF-8 where most of what is not ASCII is
valid UTF-8, else what chardet finds, else (where the evidence is weak) Windows-1252. CleverCSV
finds the dialect in the first 64 Ki characters; the delimiter is a comma, semicolon, tab or pipe,
and where there is none the one of the file's name. Fields are quoted with `"` or not at all: an
apostrophe is text, and so are quotes in tabbed text that never quote. The log of the job names
what was found.
Columns: white space in a header cell is folded, an empty one becomes `column_3` (its position),
a repeated one `name_2` (case does not count), `_cf_x` becomes `x_cf_x`, and 100 characters are
kept.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import chardet
import clevercsv
import pyarrow as pa
from chardet.enums import EncodingEra

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern=["*.csv", "*.tsv", "*.tab", "*.csv.gz", "*.tsv.gz"],
    topic=["delimited", "delimited_rejects"],
    version="1.0.0",
)

SAMPLE_CHARACTERS = 64 << 10
FIELD_CHARACTERS = 16 << 20
EVIDENCE_BYTES = 256 << 10
WEAK_EVIDENCE = 0.015
"""Below this confidence chardet names rare codecs for Western text with two or three accents."""
BATCH_ROWS = 5000
BATCH_CHARACTERS = 16 << 20

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNDECODABLE = re.compile("[\udc00-\udcff]")
LONG_WORD = re.compile(r"""([^\s,;|"'\\]{200})[^\s,;|"'\\]+""")
REJECTS = pa.schema(
    [("line", pa.int64()), ("record", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)

log = logging.getLogger("delimited")


class Record(NamedTuple):
    """What lies between two record ends, read or not."""

    line: int
    number: int
    fields: list[str]
    reason: str
    raw: str


class Handler(BasePlugin):
    """Publishes the rows of one delimited text file."""

    def execute(self, file_path: str) -> None:
        encoding = find_encoding(file_path)
        with open_text(file_path, encoding) as text:
            dialect = find_dialect(text.read(SAMPLE_CHARACTERS), file_path)
        log.info("read as %s with %s", encoding, dialect)
        with open_text(file_path, encoding) as text:
            records = read_records(text, dialect)
            header = next(records, None)
            if header is None:
                return
            if header.reason:
                raise ValueError(f"line {header.line}, the header, cannot be read: {header.reason}")
            names = column_names(header.fields)
            schema = pa.schema([(name, pa.string()) for name in names])
            self.publish("delimited", schema.empty_table())
            for batch in batches(records):
                self.publish_batch(schema, [judge(record, len(names)) for record in batch])

    def publish_batch(self, schema: Any, records: list[Record]) -> None:
        good = [record.fields for record in records if not record.reason]
        if good:
            columns = [pa.array(column, pa.string()) for column in zip(*good, strict=True)]
            self.publish("delimited", pa.Table.from_arrays(columns, schema=schema))
        bad = [record for record in records if record.reason]
        if bad:
            rows = [(each.line, each.number, each.reason, printable(each.raw)) for each in bad]
            columns = [pa.array(column) for column in zip(*rows, strict=True)]
            self.publish("delimited_rejects", pa.Table.from_arrays(columns, schema=REJECTS))


def open_bytes(path: str) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def open_text(path: str, encoding: str) -> io.TextIOWrapper:
    """The file's text with its line ends as they are, undecodable bytes as lone surrogates."""
    return io.TextIOWrapper(open_bytes(path), encoding, "keep-bytes", newline="")


def keep_bytes(error: UnicodeError) -> tuple[str, int]:
    """Like `surrogateescape`, but for any byte: UTF-16 has errors below 128 too."""
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error("keep-bytes", keep_bytes)
csv.field_size_limit(FIELD_CHARACTERS)


def find_encoding(path: str) -> str:
    """The encoding of the whole file: every byte is looked at, few are kept.

    Raises:
        ValueError: the file is a damaged gzip file.
    """
    try:
        with open_bytes(path) as file:
            start = file.read(EVIDENCE_BYTES)
            for mark, encoding in BYTE_ORDER_MARKS.items():
                if start.startswith(mark):
                    return encoding
            if start[1::2].count(0) > len(start) // 4:
                return "utf-16-le"
            if start[0::2].count(0) > len(start) // 4:
                return "utf-16-be"
            evidence = first_not_utf8(start, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the gzip file is damaged: {error}") from error
    return guess_encoding(evidence) if evidence else "utf-8"


def first_not_utf8(chunk: bytes, file: gzip.GzipFile | io.BufferedReader) -> bytes:
    """The first piece of the file that is not UTF-8; empty where all of it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        pending = decoder.getstate()[0]
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            return pending + chunk
        if not chunk:
            return b""
        chunk = file.read(EVIDENCE_BYTES)


def guess_encoding(evidence: bytes) -> str:
    """The likeliest encoding of bytes that are not all UTF-8."""
    kept = evidence.decode("utf-8", "surrogateescape")
    broken = len(UNDECODABLE.findall(kept))
    if sum(not character.isascii() for character in kept) > 2 * broken:
        return "utf-8"
    found = chardet.detect(
        evidence,
        encoding_era=EncodingEra.MODERN_WEB,
        prefer_superset=True,
        exclude_encodings=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
    )
    weak = not found["encoding"] or found["confidence"] < WEAK_EVIDENCE
    return "cp1252" if weak else str(found["encoding"])


def find_dialect(sample: str, path: str) -> dict[str, Any]:
    """Keywords for `csv.reader`: delimiter, quotes and escape character."""
    # CleverCSV takes neither NUL nor surrogates, and quadratic time over a long word.
    sample = LONG_WORD.sub(r"\1", UNDECODABLE.sub("", sample.replace("\0", "")))
    found = clevercsv.Detector().detect(sample, delimiters=[",", ";", "\t", "|"])
    by_name = "\t" if re.search(r"\.(tsv|tab)(\.gz)?$", path, re.IGNORECASE) else ","
    delimiter = (found and found.delimiter) or by_name
    quote = found.quotechar if found else '"'
    # Only where the whole sample says so: inches in tabbed text, for one.
    literal = delimiter == "\t" and not quote and '"' in sample
    return {
        "delimiter": delimiter,
        "quotechar": '"',
        "escapechar": (found and found.escapechar) or None,
        "quoting": csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
    }


def read_records(text: Iterable[str], dialect: dict[str, Any]) -> Iterator[Record]:
    """Every record that the csv module finds; after one it cannot read it goes on."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True, **dialect)
    number = 0
    while True:
        taken.clear()
        line, fields, reason = reader.line_num + 1, [], ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
            if reason == "unexpected end of data":
                reason = "the text ends within quotes or after an escape"
        if fields or reason:
            number += 1
            yield Record(line, number, fields, reason, "".join(taken))


def judge(record: Record, width: int) -> Record:
    """The record, with the reason why it is no row of the table, if there is one."""
    reason = record.reason
    if not reason and len(record.fields) != width:
        reason = f"{len(record.fields)} fields where the header has {width}"
    if not reason and "\0" in record.raw:
        reason = "a NUL character"
    if not reason and not record.raw.isascii() and UNDECODABLE.search(record.raw):
        reason = "bytes that are not in the encoding of the file"
    return record._replace(reason=reason)


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by some thousands, or fewer where they are long."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw)
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
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
    """The text as Unicode that can be stored: NUL and undecodable bytes are escaped."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
