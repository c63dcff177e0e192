# /// script
# requires-python = ">=3.11"
# dependencies = ["chardet>=7.7", "pyarrow>=23.0.1"]
# ///
"""Delimited text (CSV, TSV and similar; any encoding; also gzipped) becomes a table of text.

The first record of the table is the header. Every later record becomes either a row of the first
topic or a reject in the second. Values stay as they are: no type is guessed, and an empty field is
an empty string. Empty lines are not records, as in `csv.reader`.

Each of these is detected unless the option is set (`casparian publish delimited --option
NAME=VALUE`). The job's log explains every choice among several possible answers in a line that
begins with `guessed: `. If two answers are equally good, the job fails with a message that names
the option to set.
- `encoding`: from the byte order mark; UTF-16 or UTF-32 if both the bytes and the decoded text
  agree; UTF-8 if most of the bytes that are not ASCII are valid UTF-8; else chardet's answer, or
  Windows-1252 if the evidence is weak.
- `delimiter`: one or more characters, or `tab`, `space`, `\\x01`; `none` for one column. Detected
  in a sample of the whole file. Of the delimiters that give all records the same width above 1, the
  one that the file's name suggests is taken, then the most frequent. If none fits, a sign such as
  `§` counts if every line has it equally often, twice or more. A first line `sep=;` decides.
- `quote`: a character or `none`. Detected: `"`; in tab-separated text also none.
- `escape`: `none`; or a character that escapes a delimiter, quote, line end or itself; or
  `in_quotes`: a backslash that does so between quotes only. Detected: a backslash, only if quotes
  do not close without it, and then only before a quote or itself.
- `blanks`: `skip` or `keep` blanks between a delimiter and a quote. Detected: skipped only if
  quotes do not close otherwise.
- `skip_lines`: the number of lines above the table to leave out.
- `header_line`: the line of the header, or `none` (columns are named `column_1` and so on).
  Detected: the first record of those with the same width.
- `comment`: lines that begin with it are skipped; or `none`. Detected: `#` above the table; if such
  lines are there, lines in the table that begin with it and have another width too.

A record is rejected (line, record, reason, raw) if its number of fields differs from the header's,
if its quotes do not close or are followed by more text, if it repeats the header (ignoring case and
white space), if it has more than 16 Mi characters, or if it has a NUL or bytes that are invalid in
the file's encoding. If a quote does not close, its line is rejected, and reading continues on the
next line. If every record ends with one more delimiter than the header, that delimiter begins no
field. U+FEFF at the start of a record is removed. `line` is the physical line where the record
starts, `record` counts records; both count from 1, and the header is record 1. `raw` is the
record's text, at most 1 Mi characters, with `\\x00` for NUL and `\\udcNN` for an invalid byte NN.

With a contract (`casparian table add`) the rows are typed, and what is no row is counted: lines
above the table, comments, repeated headers, and everything from the first line on that matches the
contract's `footer`. The header is the first line that matches `header`; else, of the first records,
one that has all of the contract's columns; else it is found as above. `control` finds totals in the
lines that are skipped, and the job fails if they differ from what was read. A contract that orders
a survey has the file described instead, in one row of the topic `survey`.

A file of another kind fails; the message names the kind. So does text without a delimiter, except
in a `.csv` or `.tsv`, which may have one column. An empty file publishes nothing.
Column names: runs of white space become one space, an empty header cell becomes `column_3` (its
position), a repeated one `name_2` (case is ignored), `_cf_x` becomes `x_cf_x`, and names are cut to
100 characters.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import PurePath
from typing import Any, NamedTuple

import chardet
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
from chardet.enums import EncodingEra

from casparian_flow.intake import Intake, label
from casparian_flow.sdk import (
    BasePlugin,
    PluginMetadata,
    batches,
    column_names,
    foreign_kind,
    open_bytes,
    own_publish,
    printable,
)

MANIFEST = PluginMetadata(
    pattern=[
        "*.csv", "*.tsv", "*.tab", "*.psv", "*.txt",
        "*.csv.gz", "*.tsv.gz", "*.tab.gz", "*.psv.gz", "*.txt.gz",
    ],
    topic=["delimited", "delimited_rejects"],
    catch_all=True,
    version="1.2.0",
    options={
        "encoding": "",
        "delimiter": "",
        "quote": "",
        "escape": "",
        "blanks": "",
        "skip_lines": 0,
        "header_line": "",
        "comment": "",
    },
)  # fmt: skip

EVERY = 1 << 62
"""More lines than any file has."""
SAMPLE_CHARACTERS = 64 << 10
BLOCK_CHARACTERS = 1 << 20
SMALL_BLOCK = 64 << 10
BACKWARDS = 64
"""How many quotes before a line are looked at to find a line end that no field has."""
COLUMN_CHARACTERS = 2 << 10
"""How much a block has for each column at least: each costs time in every block."""
SAMPLE_LINES = 20
PIECES = 16
PIECE_BYTES = 8 << 10
RECORD_CHARACTERS = 16 << 20
HEADER_RECORDS = 200
ABOVE_LINES = 1000
"""So many of the last lines above the header are looked at, whether they are rows."""
RAW_CHARACTERS = 1 << 20
CHUNK_BYTES = 256 << 10
WEAK_EVIDENCE = 0.015
"""Below this confidence chardet guesses rare encodings for Western text with few accents."""
NEIGHBOURS = ("Windows-1250", "Windows-1254", "Windows-1257")
"""With only a few accents, chardet rates these as high as the far more common Windows-1252."""
SYMBOLS = re.compile(
    "[\u00b0\u20ac\u2030\u00d7\u00f7\u00b1\u00a9\u00ae\u2122\u2013\u2014\u2026\u00ab\u00bb\u201c\u201d"
    "\u201e\u2022\u2018\u2019\u201a\u00a7\u00b5\u00b7]"
    "|(?<![A-Za-z])[\u00a3\u00bd\u00bc\u00be](?![A-Za-z])|(?<=m)[\u00b2\u00b3](?![A-Za-z])"
)
"""Non-ASCII signs of Western text without accents: degrees, quotes, dashes, prices, m²."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, because its mark starts with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MARK = "\ufeff"
UTF_8 = ("utf-8", "utf-8-sig")
NO_DELIMITER = "\ufdd1"
NOWHERE = "\ufdd0\ufdd0"
WEAK = (":", " ")
"""Delimiters that are frequent in plain text: they count only if no other one fits."""
DELIMITERS = (",", ";", "\t", "|", "^", "~", "\x01", "\x1f", *WEAK)
DELIMITER_NAMES = {
    "comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|", "space": " ", "colon": ":",
}  # fmt: skip
DELIMITER_OF_SUFFIX = {"csv": ",", "tsv": "\t", "tab": "\t", "psv": "|"}
RUN = re.compile(r"[^\w\s,;\"'.()\[\]{}<>/\\-]{2,4}")
ODD = re.compile(r"[^\w\s,;\"'.()\[\]{}<>/\\|^~:\x01\x1f\ufeff+-]")
SEP_LINE = re.compile(r'\ufeff?"?sep=([^"\r\n]{1,4})"?;*\s*\Z', re.IGNORECASE)
UNDECODABLE = re.compile("[\udc00-\udcff]")
DATE = re.compile(
    r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?:[T ,]+\d{1,2}:\d\d.*)?|\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?"
)
NUMBER = re.compile(r"[$€£]?[-+(]?[$€£]?(?:\d[\d.,' \u00a0]*|[.,]\d+)(?:[eE][-+]?\d+)?\)?[ %$€£]*")
MISSING = {"", "na", "n/a", "nan", "null", "none", "nil", "-", "--", "?", ".", "\\n"}
WHITE_SPACE = " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"
COMMENTS = ("#", "//", "%", "--", "!", "*", ";")
AGAIN = "the header again"
REJECTS = pa.schema(
    [("line", pa.int64()), ("record", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)

log = logging.getLogger("delimited")

Judged = tuple[int, int, list[str], str, str]
"""Line, number and fields of a record, why it is no row (empty: it is one), and its text."""


class Record(NamedTuple):
    """A record of the sample."""

    line: int
    fields: list[str]
    reason: str
    """Why it cannot be read; empty if it can."""
    raw: str


class Dialect(NamedTuple):
    """How a line is split into fields."""

    delimiter: str
    quote: str = '"'
    escape: str = ""
    inside: str = ""
    """The characters that can be escaped between quotes."""
    outside: str = ""
    """The characters that can be escaped outside of quotes."""
    blanks: bool = False
    """Whether blanks before a quote are skipped."""

    def __str__(self) -> str:
        text = "one column" if self.delimiter == NO_DELIMITER else f"delimiter {self.delimiter!r}"
        text += f", quote {self.quote}" if self.quote else ", no quotes"
        text += f", escape {self.escape}" if self.escape else ""
        return text + (", blanks before quotes skipped" if self.blanks else "")


class Sample(NamedTuple):
    """Text from all of the file: its first lines, and pieces from later parts."""

    head: str
    first_line: int
    whole: bool
    pieces: list[str]
    comments: list[str]
    """Comment lines above the head."""
    comment: str
    """The prefix of comment lines; empty if there are none."""


class Fit(NamedTuple):
    """The result of reading the sample in a dialect."""

    dialect: Dialect
    records: list[Record]
    """The records of the head."""
    widths: Counter[int]
    """Numbers of fields of the sample's readable records, from the table's first on."""
    errors: int
    total: int
    """Number of records in the sample, readable or not."""
    width: int
    """The most common number of fields above 1; 0 if there is none."""
    start: int
    """The index of the record where the table begins."""
    trailing: bool
    """Whether every record but the header ends with one more delimiter."""
    cells: int
    """Number of delimiters in the records of this width."""

    @property
    def delimiter(self) -> str:
        return self.dialect.delimiter

    @property
    def rows_below(self) -> int:
        """How many records of the head are part of the table."""
        return len(self.records) - self.start

    @property
    def clean(self) -> bool:
        return bool(self.width) and not self.errors and set(self.widths) == {self.width}

    @property
    def share(self) -> float:
        return self.widths[self.width] / max(1, self.total)

    @property
    def body(self) -> float:
        """The share of records of this width, from the table's first record on."""
        return self.widths[self.width] / max(1, self.total - self.start)

    @property
    def quality(self) -> tuple[bool, float]:
        return self.clean and not self.start, self.share


class Layout(NamedTuple):
    """Where the table begins and how it is read."""

    dialect: Dialect
    line: int
    """The physical line where it begins."""
    header: list[str] | None
    width: int
    trailing: bool
    comment: str
    """The prefix of comment lines to skip; empty: none are skipped."""
    every_comment: bool
    """Whether to skip all of them, not only those with another number of fields."""
    commented: bool = False
    """Whether the header is a comment line above the table."""


class Handler(BasePlugin):
    """Publishes the rows of one delimited text file."""

    def execute(self, file_path: str) -> None:
        intake = Intake(self, MANIFEST) if MANIFEST.contract else None
        options = Options(file_path, intake)
        encoding, pieces = find_encoding(file_path, options)
        if intake and options.doubt:
            intake.doubt_encoding(options.doubt)
        above = lines_above(file_path, encoding, intake, options) if intake and encoding else 0
        sample = None
        if encoding:
            with open_text(file_path, encoding) as text:
                for _ in Lines(text).upto(above):
                    pass
                sample = take_sample(text, pieces, encoding, options)
        if sample is None:
            if intake:
                intake.finish(0, {})
            return
        layout = find_layout(sample._replace(first_line=sample.first_line + above), options)
        log.info("read as %s with %s; the table begins in line %d", encoding, layout.dialect,
                 layout.line)  # fmt: skip
        for note in options.guesses:
            log.info("guessed: %s", note)
        with open_text(file_path, encoding) as text:
            lines = Lines(text)
            if intake:
                Taking(intake, lines, layout, encoding).all()
                return
            for _ in lines.upto(layout.line - 1):
                pass
            self.publish_table(lines, layout)

    def publish_table(self, lines: Lines, layout: Layout) -> None:
        """Publish the table's rows and rejects, in batches."""
        table = Table(lines, layout)
        schema = pa.schema([(name, pa.string()) for name in table.names()])
        topic, rejects_topic = MANIFEST.topic
        self.publish(topic, schema.empty_table())
        for batch in batches(table.records(), lambda record: len(record[4])):
            rows = [fields for _, _, fields, reason, _ in batch if not reason]
            if rows:
                self.publish(topic, pa.Table.from_arrays(columns_of(rows), schema=schema))
            rejects = [
                {"line": line, "record": number, "reason": reason, "raw": printable(raw)}
                for line, number, _, reason, raw in batch if reason
            ]  # fmt: skip
            if rejects:
                self.publish(rejects_topic, pa.Table.from_pylist(rejects, schema=REJECTS))
        if table.comments:
            log.info("skipped %d lines of the table that begin with %s", table.comments,
                     layout.comment)  # fmt: skip


class Options:
    """The options of one file, and the guesses made for those that are not set."""

    def __init__(self, path: str, intake: Intake | None = None) -> None:
        self.name = PurePath(path).name
        said = {word: text for word, text in (intake.dialect if intake else {}).items()
                if word in MANIFEST.options}  # fmt: skip
        self.chosen = {name: str(value) for name, value in {**MANIFEST.options, **said}.items()}
        self.known = intake.known_names() if intake else set()
        """Columns that the table has in any case."""
        self.guesses: list[str] = []
        self.doubt = ""
        """Why the encoding may be another one, with other text; empty if it is clear."""
        self.check()
        self.suffix = re.sub(r"\.gz$", "", self.name.lower()).rpartition(".")[2]

    def __getitem__(self, name: str) -> str:
        return self.chosen[name]

    @property
    def usual(self) -> str:
        """The delimiter that the file's name suggests."""
        return DELIMITER_OF_SUFFIX.get(self.suffix, "")

    def check(self) -> None:
        """Raise ValueError if an option has an invalid value."""
        quote, escape = self.character("quote"), self["escape"]
        wrong = {
            "quote": len(quote) > 1 and quote != "none",
            "escape": len(escape) > 1 and escape not in ("none", "backslash", "in_quotes"),
            "blanks": self["blanks"] not in ("", "skip", "keep"),
            "skip_lines": not self["skip_lines"].isdecimal(),
            "header_line": self["header_line"] not in ("", "none")
            and not re.fullmatch("[1-9][0-9]*", self["header_line"]),
        }
        try:
            codecs.lookup(self["encoding"] or "utf-8").incrementaldecoder()
        except (LookupError, TypeError):
            wrong["encoding"] = True
        for name in (name for name in wrong if wrong[name]):
            raise ValueError(f"option {name} is {self[name]!r}, which is not a valid value")

    def character(self, name: str) -> str:
        """The character that an option names; empty if the option is not set."""
        chosen = self[name]
        if chosen.lower() in DELIMITER_NAMES:
            return DELIMITER_NAMES[chosen.lower()]
        escaped = re.fullmatch(r"\\(?:t|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", chosen)
        return chosen.encode().decode("unicode_escape") if escaped else chosen

    @property
    def header_line(self) -> int:
        """The chosen line, from 1; 0 if none is chosen."""
        return 0 if self["header_line"] in ("", "none") else int(self["header_line"])

    def guess(self, text: str) -> None:
        if text not in self.guesses:
            self.guesses.append(text)

    def guess_western(self, text: str, evidence: bytes) -> None:
        """Note that Windows-1252 is taken although the bytes do not speak for it."""
        self.guess(f"encoding cp1252 ({text})")
        read = evidence.decode("cp1252", "replace")
        others = [name for name in NEIGHBOURS if evidence.decode(name, "replace") != read]
        if others:
            self.doubt = f"it is not UTF-8, and may be cp1252 or {others[0]}"

    def refuse(self, what: str, *choices: str) -> ValueError:
        """The error for a file that is not clear, with the command that settles it."""
        if MANIFEST.contract:
            return ValueError(f"{self.name}: {what}; the table's dialect can say it: "
                              f"{', or '.join(choices)}")  # fmt: skip
        command = own_publish("delimited", self.name, *choices)
        return ValueError(f"{self.name}: {what}; to settle it: {command}")


class Lines:
    """The lines of a text, numbered from 1; lines can be put back and read again."""

    def __init__(self, text: io.TextIOBase, number: int = 0) -> None:
        self._text = text
        self._again: deque[str] = deque()
        self.number = number
        self.taken: list[str] = []
        self.size = 0

    def take(self) -> str:
        """The next line with its line end; empty at the end of the text. A long line is cut."""
        line = self._again.popleft() if self._again else self._next()
        if line:
            self.number += 1
        return line

    def _next(self) -> str:
        line = self._text.readline(RECORD_CHARACTERS + 1)
        if len(line) > RECORD_CHARACTERS:
            rest = line
            while rest and not rest.endswith(("\n", "\r")):
                rest = self._text.readline(RECORD_CHARACTERS)
        return line

    def again(self, lines: Sequence[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)

    def upto(self, number: int) -> Iterator[str]:
        """Take the lines up to this one."""
        while self.number < number and (line := self.take()):
            yield line

    def read(self, size: int) -> str:
        """About `size` characters in whole lines, which are not numbered yet."""
        if self._again:
            text = "".join(self._again)
            self._again.clear()
            return text
        text = self._text.read(size)
        return text + self._next() if len(text) == size else text

    def put_back(self, text: str) -> None:
        """Have these lines, which `read` gave, taken next."""
        self._again.extend(io.StringIO(text, newline="").readlines())

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        """The next line of a record that may have several lines."""
        line = self.take()
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.size += len(line)
        if self.size > RECORD_CHARACTERS:
            raise csv.Error(f"more than {RECORD_CHARACTERS} characters")
        return line


def line_end(text: str, start: int, stop: int) -> int:
    """The position after the last line end between two positions; 0 if there is none."""
    end = max(text.rfind("\n", start, stop), text.rfind("\r", start, stop)) + 1
    return end + (end > 0 and text[end - 1] == "\r" and text.startswith("\n", end))


def count_lines(text: str) -> int:
    ends = text.count("\n") + ((text.count("\r") - text.count("\r\n")) if "\r" in text else 0)
    return ends + (not text.endswith(("\n", "\r")))


def columns_of(rows: Iterable[list[str]]) -> list[pa.Array]:
    return [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]


def lines_of(text: str, number: int = 0) -> Lines:
    return Lines(io.StringIO(text, newline=""), number)


class Splitter:
    """Splits records that csv.reader cannot: with delimiters of several characters, blanks before
    quotes, or an escape that applies to some characters only."""

    def __init__(self, lines: Lines, dialect: Dialect) -> None:
        quote, escape = re.escape(dialect.quote), re.escape(dialect.escape)
        delimiter = re.escape(dialect.delimiter)
        self._lines, self._dialect = lines, dialect
        inside, outside = re.escape(dialect.inside), re.escape(dialect.outside)
        plain = f"[^{quote}{escape}]++" if quote else ""
        escaped = f"|{escape}(?:\r\n|[{inside}])" if escape else ""
        self._inside = re.compile(f"(?:{plain}|{quote}{quote}{escaped and escaped + '?'})*+")
        self._doubled = re.compile(f"{quote}{quote}{escaped}")
        escaped = f"|{escape}(?:\r\n|[{outside}])?+" if outside else ""
        bare = f"(?!{delimiter})[^{escape if outside else ''}\r\n]"
        self._bare = re.compile(f"(?:{bare}{escaped})*+")
        self._escaped = re.compile(f"{escape}(\r\n|[{outside}])") if outside else None

    def __next__(self) -> list[str]:
        fields: list[str] = []
        line, position = next(self._lines), 0
        delimiter, quote = self._dialect.delimiter, self._dialect.quote
        while True:
            start = self._blanks(line, position)
            if quote and line.startswith(quote, start):
                cell, line, position = self._quoted(line, start + len(quote))
                position = self._blanks(line, position)
                if line[position:].rstrip("\r\n") and not line.startswith(delimiter, position):
                    raise csv.Error("a delimiter is expected after a quote")
            else:
                cell, line, position = self._unquoted(line, position)
            fields.append(cell)
            if not line.startswith(delimiter, position):
                return fields
            position += len(delimiter)

    def _blanks(self, line: str, position: int) -> int:
        if self._dialect.blanks:
            while (
                line.startswith((" ", "\t"), position) and line[position] != self._dialect.delimiter
            ):
                position += 1
        return position

    def _quoted(self, line: str, position: int) -> tuple[str, str, int]:
        """The text up to the closing quote, the line with that quote, and the position after it."""
        text, line, end = self._match(self._inside, line, position, quoted=True)
        text = self._doubled.sub(lambda pair: pair[0][1:], text)
        return text, line, end + len(self._dialect.quote)

    def _unquoted(self, line: str, position: int) -> tuple[str, str, int]:
        text, line, end = self._match(self._bare, line, position, quoted=False)
        return (self._escaped.sub(r"\1", text) if self._escaped else text), line, end

    def _match(
        self, pattern: re.Pattern[str], line: str, position: int, *, quoted: bool
    ) -> tuple[str, str, int]:
        """Match a pattern, also over line ends: the text, the last line and the end in it."""
        parts: list[str] = []
        while True:
            found = pattern.match(line, position)
            assert found
            parts.append(found[0])
            if found.end() < len(line) or not (quoted or found[0].endswith(("\n", "\r"))):
                return "".join(parts), line, found.end()
            try:
                line, position = next(self._lines), 0
            except StopIteration:
                if quoted:
                    raise csv.Error("unexpected end of data") from None
                return "".join(parts), line, found.end()


class Reader:
    """Reads records from lines, and continues after one that cannot be read."""

    def __init__(self, lines: Lines, dialect: Dialect, width: int = 0) -> None:
        self._lines, self._dialect, self._width = lines, dialect, width
        self._doubt = 0
        quote, delimiter = re.escape(dialect.quote), re.escape(dialect.delimiter)
        escape = re.escape(dialect.escape)
        escaped = f"|{escape}[\\s\\S]" if escape else ""
        blanks = "[ \\t]*" if dialect.blanks else ""
        field = (
            f"(?:{blanks}{quote}(?:[^{quote}{escape}]|{quote}{quote}{escaped})*+{quote}{blanks}"
            f"|(?:(?!{delimiter})[^{quote}\r\n])*+)"
        )
        # Matches a record whose quotes only enclose fields.
        self._tidy = re.compile(f"{field}(?:{delimiter}{field})*+[\r\n]*") if quote else None
        ordinary = len(dialect.delimiter) == 1 and not dialect.escape and not dialect.blanks
        self._ordinary = ordinary and len(dialect.quote) == 1
        self._split = self._splitter(lines)

    def _splitter(self, lines: Lines) -> Iterator[list[str]]:
        if not self._ordinary:
            return Splitter(lines, self._dialect)  # type: ignore[return-value]
        quote = self._dialect.quote
        return csv.reader(lines, delimiter=self._dialect.delimiter, quotechar=quote, strict=True)

    def records(self, comment: str = "") -> Iterator[tuple[int, list[str], str, str]]:
        """All records, as `Record` has them; a tuple costs less for each row.

        A line that begins with `comment` has neither fields nor a reason.
        """
        lines, delimiter = self._lines, self._dialect.delimiter
        quote = self._dialect.quote or NOWHERE
        escape = self._dialect.escape or NOWHERE
        comment = comment or NOWHERE
        while line := lines.take():
            number = lines.number
            if line.startswith(MARK):
                line = line.lstrip(MARK)
            if line.startswith(comment):
                yield number, [], "", line
            elif quote in line or escape in line or len(line) > RECORD_CHARACTERS:
                fields, reason, raw = self._hard(line)
                yield number, fields, reason, raw
            elif text := line.rstrip("\r\n"):
                yield number, text.split(delimiter), "", line

    def _hard(self, line: str) -> tuple[list[str], str, str]:
        """Read a record that may have several lines: its fields, the reason if it cannot be read,
        and its text."""
        lines = self._lines
        number = lines.number
        lines.again([line])
        lines.taken, lines.size = [], 0
        fields: list[str] = []
        reason = ""
        try:
            fields = next(self._split)
        except csv.Error as error:
            reason = str(error)
            if "expected after" in reason:
                reason = "text after a closing quote"
        taken = lines.taken
        raw = "".join(taken)
        if len(taken) > 1:
            odd = self._width and (len(fields) != self._width or not self.is_tidy(raw))
            if reason or (odd and self._records_inside(taken[1:])):
                # The quote in the first line is a stray one: the lines after it are records.
                lines.again(taken[1:])
                self._doubt = max(self._doubt, number + len(taken) - 1)
                last = " before the end" if reason == "unexpected end of data" else ""
                return [], f"a quote that does not close{last}", taken[0]
        if reason == "unexpected end of data":
            reason = "a quote that does not close before the end"
        if not reason and number <= self._doubt and not self.is_tidy(raw):
            reason = "a quote within a field, after a line with a quote that does not close"
        return fields, reason, raw

    def _records_inside(self, lines: list[str]) -> bool:
        """Whether lines between two quotes are records of the table."""
        count = sum(self._alone(line) for line in lines)
        return count == len(lines) or (self._width > 2 and 2 * count > len(lines))

    def _alone(self, line: str) -> bool:
        """Whether a line is a record of the right width, without a stray quote."""
        try:
            fields = next(self._splitter(lines_of(line)))
        except (csv.Error, StopIteration):
            return False
        return len(fields) == self._width and self.is_tidy(line)

    def is_tidy(self, text: str) -> bool:
        return self._tidy is None or bool(self._tidy.fullmatch(text))


@contextmanager
def open_text(path: str, encoding: str) -> Iterator[io.TextIOWrapper]:
    """Open the file as text, keeping its line ends; invalid bytes become lone surrogates."""
    with open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding, "keep-bytes", newline="")  # type: ignore[arg-type]


def keep_bytes(error: UnicodeError) -> tuple[str, int]:
    """Like `surrogateescape`, but for any byte: UTF-16 has errors below 128 too."""
    assert isinstance(error, UnicodeDecodeError)
    bad = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in bad), error.end


codecs.register_error("keep-bytes", keep_bytes)
csv.field_size_limit(RECORD_CHARACTERS)


def find_encoding(path: str, options: Options) -> tuple[str, list[bytes]]:
    """Read the whole file, to find its encoding and take pieces of it for the sample.

    Returns:
        the encoding, which is empty for an empty file, and the pieces.

    Raises:
        ValueError: the file is not text, or a damaged gzip file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    evidence, pieces, stride, empty, is_ascii = b"", [], 1, True, True
    with open_bytes(path) as file:
        start = file.read(CHUNK_BYTES)
        if not start:
            return "", []
        if kind := foreign_kind(start) or json_kind(start):
            raise ValueError(
                f"{options.name}: this is {kind}, not delimited text; name it so that another "
                "plugin reads it, or publish this plugin with a narrower --pattern"
            )
        for number, chunk in enumerate(chain([start], iter(partial(file.read, CHUNK_BYTES), b""))):
            empty = empty and not chunk.strip(b"\0")
            is_ascii = is_ascii and chunk.isascii()
            if number and number % stride == 0:
                pieces.append(chunk[:PIECE_BYTES])
                if len(pieces) == PIECES:
                    del pieces[::2]
                    stride *= 2
            if not evidence:
                pending = decoder.getstate()[0]
                try:
                    decoder.decode(chunk)
                except UnicodeDecodeError:
                    evidence = pending + chunk
    if empty:
        raise ValueError(f"{options.name}: this file has only NUL bytes, so it has no rows")
    marked = next((BYTE_ORDER_MARKS[m] for m in BYTE_ORDER_MARKS if start.startswith(m)), "")
    evidence = evidence or decoder.getstate()[0]
    chosen = options["encoding"]
    if chosen and not (is_ascii or evidence) and codecs.lookup(chosen).name not in UTF_8:
        options.doubt = f"its bytes are UTF-8, and {chosen} is said"
    return options["encoding"] or marked or found_encoding(start, evidence, options), pieces


def found_encoding(start: bytes, evidence: bytes, options: Options) -> str:
    """The encoding of a file without a byte order mark.

    Args:
        start: the first bytes of the file.
        evidence: the first chunk of it that is not valid UTF-8; empty if there is none.
    """
    if 0 in start and (wide := wide_encoding(start, bool(evidence))):
        options.guess(f"encoding {wide}: it decodes without an error, and to plausible text")
        return wide
    return guess_encoding(evidence.replace(b"\0", b""), options) if evidence else "utf-8"


def json_kind(start: bytes) -> str:
    """`JSON` if the text is JSON, and not just a header in brackets; else empty."""
    text = start[:8192].decode("utf-8-sig", "replace").lstrip()
    if not re.match(r'\{\s*"|\[\s*[\[{"\d]|[\[{]\s*\n', text):
        return ""
    for part in (text, text.splitlines()[0]):
        try:
            json.loads(part)
            return "JSON"
        except ValueError:
            continue
    return "JSON" if re.match(r'\{\s*"[^"\n]*"\s*:|\[\s*\{', text) else ""


def wide_encoding(start: bytes, not_utf8: bool) -> str:
    """UTF-16 or UTF-32 without a byte order mark, if the bytes and the decoded text agree."""
    # The high bytes of letters beyond Latin-1 are control characters: 0x04 for Cyrillic.
    odd = sum(byte < 32 and byte not in (0, 9, 10, 13) for byte in start) > len(start) / 20
    for name, unit in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        try:
            text = start[: len(start) // unit * unit].decode(name).replace("\0", "")
        except UnicodeDecodeError:
            continue
        plausible = all(
            character in "\t\n\r\f\x01\x1a\x1f"
            or unicodedata.category(character) not in ("Cc", "Cn", "Co")
            for character in set(text)
        )
        latin = sum(character < "\u0100" for character in text) / max(1, len(text))
        lines = "\n" in text or "\r" in text
        if text and plausible and (latin >= 0.7 or (latin >= 0.05 and lines and (not_utf8 or odd))):
            return name
    return ""


def guess_encoding(evidence: bytes, options: Options) -> str:
    """The most likely encoding of bytes that are not all valid UTF-8."""
    kept = evidence.decode("utf-8", "surrogateescape")
    broken = len(UNDECODABLE.findall(kept))
    if sum(not character.isascii() for character in kept) > 2 * broken:
        options.guess(f"encoding utf-8, though {broken} bytes of a piece are not")
        return "utf-8"
    if SYMBOLS.sub("", evidence.decode("cp1252", "replace")).isascii():
        options.guess(
            "encoding cp1252: all characters outside ASCII are symbols that fit their context"
        )
        return "cp1252"
    found = chardet.detect_all(
        evidence,
        ignore_threshold=True,
        encoding_era=EncodingEra.MODERN_WEB,
        prefer_superset=True,
        exclude_encodings=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
    )
    confidences = {guess["encoding"]: guess["confidence"] for guess in found}
    best, western = found[0]["confidence"], confidences.get("Windows-1252", 0.0)
    name = str(found[0]["encoding"])
    western_bytes = not re.search(rb"[\x81\x8d\x8f\x90\x9d]", evidence)
    faint = western_bytes and not re.match("(?i)windows-|iso-|koi|cp125|cp874|tis", name)
    if not found[0]["encoding"] or best < (0.05 if faint else WEAK_EVIDENCE):
        options.guess_western("no evidence for another one", evidence)
    elif name in NEIGHBOURS and western >= 0.7 * best:
        words = f"{western:.0%} sure; {name} is as likely by the bytes"
        options.guess_western(words, evidence)
    else:
        options.guess(f"encoding {name} ({best:.0%} sure)")
        return name
    return "cp1252"


def lines_above(path: str, encoding: str, intake: Intake, options: Options) -> int:
    """The number of lines above the first one that matches the contract's header.

    Raises:
        ValueError: no line does.
    """
    if "header" not in intake.dialect:
        return 0
    options.chosen["header_line"] = "1"  # of the lines below these
    above = 0
    with open_text(path, encoding) as text:
        for some in batches(Lines(text).upto(EVERY), len):
            separator = None if above else SEP_LINE.match(some[0])
            if separator:
                options.chosen["delimiter"] = options["delimiter"] or separator[1]
            found = intake.first("header", some)
            if found >= 0:
                return above + found
            above += len(some)
    pattern = intake.dialect["header"]
    raise ValueError(f"{options.name}: none of its {above:,} lines matches the header {pattern!r}")


def take_sample(
    text: io.TextIOBase, pieces: list[bytes], encoding: str, options: Options
) -> Sample | None:
    """The sample, without lines that are certainly above the table; None if it has no record."""
    head = last = text.read(SAMPLE_CHARACTERS)
    while last and head.count("\n") + head.count("\r") < SAMPLE_LINES and len(head) < 4 << 20:
        head += (last := text.read(SAMPLE_CHARACTERS))
    whole = len(last) < SAMPLE_CHARACTERS
    lines = io.StringIO(head, newline="").readlines()
    if not whole and len(lines) > 1:
        lines.pop()
    if not head.strip("\r\n" + MARK):
        return None
    above = max(int(options["skip_lines"]), options.header_line - 1)
    if above >= len(lines):
        raise options.refuse(f"there is no line {above + 1}", "skip_lines=0")
    separator = SEP_LINE.match(lines[0]) if not above else None
    if separator:
        above = 1
        options.chosen["delimiter"] = options["delimiter"] or separator[1]
        log.info("line 1 says that the delimiter is %r", separator[1])
    prefix = {"": "#", "none": NOWHERE}.get(options["comment"], options["comment"])
    begin, comments = above, []
    while not options.header_line and begin < len(lines):
        line = lines[begin].lstrip(MARK)
        if line.startswith(prefix):
            comments.append(line)
        elif line.strip("\r\n"):
            break
        begin += 1
    if begin == len(lines):  # only comments: they are the table
        begin, comments = above, []
    parts = []
    if encoding not in ("utf-16", "utf-32"):  # these need the mark at the start of the file
        for piece in pieces:
            found = io.StringIO(piece.decode(encoding, "keep-bytes"), newline="").readlines()
            parts.append("".join(found[1:-1]))
    if begin == len(lines):
        return None
    marked = prefix if comments or options["comment"] not in ("", "none") else ""
    return Sample("".join(lines[begin:]), begin + 1, whole, parts, comments, marked)


def find_layout(sample: Sample, options: Options) -> Layout:
    """Find the table and its dialect in the sample.

    Raises:
        ValueError: they are not clear; the message names the options that settle it.
    """
    fits = [best_fit(delimiter, sample, options) for delimiter in candidates(sample, options)]
    fit = choose(fits, sample, options)
    dialect, width = fit.dialect, fit.width or 1
    if dialect.escape and not options["escape"]:
        places = " and ".join(
            f"before {' and '.join(map(repr, chars))} {where}"
            for chars, where in ((dialect.inside, "in quotes"), (dialect.outside, "outside"))
        )
        options.guess(f"escape {dialect.escape} ({places}): quotes do not close without it")
    if dialect.blanks and not options["blanks"]:
        options.guess("blanks before a quote are skipped: quotes do not close otherwise")
    if fit.trailing:
        line = fit.records[fit.start].line
        options.guess(f"the delimiter that ends every record below line {line} begins no field")
    comment, every = sample.comment, options["comment"] not in ("", "none")
    if not fit.records:
        raise options.refuse("no line can be read", "delimiter=none")
    if options["header_line"] == "none":
        return Layout(dialect, sample.first_line, None, width, False, comment, every)
    for index, (line, fields, reason, _) in enumerate(fit.records[:HEADER_RECORDS]):
        known = options.known if not (reason or options.header_line) else set()
        if not known.isdisjoint(fields) and known <= {*column_names(fields)}:
            trailing = fit.trailing and fit.start == index
            return Layout(dialect, line, fields, len(fields), trailing, comment, every)
    if options.header_line:
        line, fields, reason, _ = fit.records[0]
        if reason:
            raise options.refuse(f"line {line}, the header, cannot be read: {reason}", "quote=none")
        trailing = fit.trailing and fit.start == 0
        return Layout(dialect, line, fields, len(fields), trailing, comment, every)
    return find_header(fit, sample, options)._replace(comment=comment, every_comment=every)


def candidates(sample: Sample, options: Options) -> list[str]:
    """The delimiters to try: the chosen one, or all that occur in the sample."""
    chosen = options.character("delimiter")
    if chosen:
        return [NO_DELIMITER if chosen == "none" else chosen]
    lines = io.StringIO(sample.head[: 16 << 10], newline=None).read().split("\n")
    runs = Counter(run for line in lines for run in set(RUN.findall(line)))
    found = [
        run for run, count in runs.most_common(3)
        if 4 * count > len(lines) and (count > 1 or len(set(run)) == 1)  # cells may have line ends
    ]  # fmt: skip
    odd = [sign for sign in dict.fromkeys(ODD.findall(lines[0] if lines else ""))
           if len({line.count(sign) for line in lines if line}) == 1]  # fmt: skip
    return [sign for sign in (*found, *DELIMITERS, *odd) if sign in sample.head]


def best_fit(delimiter: str, sample: Sample, options: Options) -> Fit:
    """Read the sample with a delimiter and the simplest quoting that works."""
    chosen = {name: options.character(name) for name in ("quote", "escape", "blanks")}
    quote = {"none": "", "": '"'}.get(chosen["quote"], chosen["quote"])
    dialect = Dialect(delimiter, quote, blanks=chosen["blanks"] == "skip")
    escape = {"backslash": "\\"}.get(chosen["escape"], chosen["escape"])
    if escape == "in_quotes":
        dialect = dialect._replace(escape="\\", inside=f"{quote}\\", outside="")
    elif escape not in ("", "none"):
        specials = f"{delimiter[0]}{quote or chr(34)}{escape}\r\n"
        dialect = dialect._replace(escape=escape, inside=specials, outside=specials)
    best = read_sample(dialect, sample)
    if not quote or quote not in sample.head or (best.quality[0] and not tabbed(best, chosen)):
        return best
    tried = [dialect]
    edge = re.escape(delimiter)
    beside = rf"(?:^|{edge})[ \t]+{quote}|{quote}[ \t]+(?:{edge}|$)"
    if not chosen["blanks"] and re.search(beside, sample.head, re.MULTILINE):
        tried.append(dialect._replace(blanks=True))
    if not chosen["escape"] and f"\\{quote}" in sample.head:
        pairs = escapes(sample.head, quote)
        tried += [simple._replace(escape="\\", inside=inside, outside=outside)
                  for simple in tried for inside, outside in pairs]  # fmt: skip
    for other in tried[1:]:
        found = read_sample(other, sample)
        # An escape is accepted only if quotes do not close without it.
        widths_close = found.quality > best.quality and (found.quality[0] or not other.escape)
        if found.errors < best.errors or (found.errors == best.errors and widths_close):
            best = found
    if tabbed(best, chosen):
        literal = read_sample(dialect._replace(quote=""), sample)
        if literal.quality[0]:
            options.guess("quotes are text: more of them stand alone than enclose a field")
            return literal
    return best


def tabbed(found: Fit, chosen: dict[str, str]) -> bool:
    """Whether quotes in tab-separated text may be text: fewer enclose a field than do not."""
    if chosen["quote"] or found.delimiter != "\t":
        return False
    reader = Reader(lines_of(""), found.dialect)
    if not found.errors and all(reader.is_tidy(record.raw) for record in found.records):
        return False
    text = "".join(record.raw for record in found.records)
    enclosing = re.findall(r'(?:^|\t)"(?:[^"\t\r\n]|"")*"(?=[\t\r\n]|\Z)', text, re.MULTILINE)
    stray = re.findall(r'(?:^|\t)[^"\t\r\n]+"|(?:^|\t)"(?:[^"\r\n]|"")*"[^"\t\r\n]',
                       text, re.MULTILINE)  # fmt: skip
    return len(stray) + found.errors > len(enclosing)


def escapes(head: str, quote: str) -> list[tuple[str, str]]:
    """What a backslash may escape between quotes and outside of them; the likelier pair is first.

    If the text has a single backslash somewhere, its writer does not double backslashes there.
    """
    lone = re.compile(rf"(?<!\\)(?:\\\\)*\\(?![\\{quote}])")
    parts = re.split(rf"({quote}(?:[^{quote}\\]|\\.|{quote}{quote})*{quote})", head)
    both = f"{quote}\\"
    outside = quote if any(map(lone.search, parts[::2])) else both
    if any(map(lone.search, parts[1::2])):
        return [(quote, outside), (both, outside)]
    return [(both, outside)]


def read_sample(dialect: Dialect, sample: Sample) -> Fit:
    """Read the sample in a dialect."""
    records = read_head(dialect, sample)
    pieces = [
        fields for piece in sample.pieces for fields in read_piece(dialect, piece, sample.comment)
    ]
    # The first and the last record of a piece may be cut; one piece of sixteen cannot decide.
    counts = count_widths(records, pieces)
    width, start = table_width([len(record.fields) for record in records], counts, len(pieces))
    table = [record.fields for record in records[start:]] + pieces
    trailing = bool(
        width and start and len(records[start - 1].fields) == width - 1
        and all(not fields[-1] for fields in table if len(fields) == width)
    )  # fmt: skip
    return Fit(
        dialect=dialect,
        records=records,
        widths=count_widths(records[start:], pieces),
        errors=sum(bool(record.reason) for record in records),
        total=len(records) + len(pieces),
        width=width,
        start=start - trailing,
        trailing=trailing,
        cells=(width - 1) * counts[width],
    )


def read_head(dialect: Dialect, sample: Sample) -> list[Record]:
    records = []
    reader = Reader(lines_of(sample.head, sample.first_line - 1), dialect)
    for record in map(Record._make, reader.records(sample.comment)):
        if record.reason.endswith("before the end") and not sample.whole:
            break  # cut by the end of the sample
        if record.fields or record.reason:
            records.append(record)
    return records


def read_piece(dialect: Dialect, piece: str, comment: str) -> list[list[str]]:
    """The fields of a piece's readable records. The piece may begin within quotes."""
    texts = (piece, dialect.quote + piece) if dialect.quote in piece else (piece,)
    tries = [list(Reader(lines_of(text), dialect).records(comment)) for text in texts]
    best = min(tries, key=lambda records: sum(bool(reason) for *_, reason, _ in records))
    return [fields for _, fields, reason, _ in best if fields and not reason]


def count_widths(records: list[Record], pieces: list[list[str]]) -> Counter[int]:
    """Number of fields -> how many readable records have it."""
    widths = Counter(len(record.fields) for record in records if not record.reason)
    widths.update(map(len, pieces))
    return widths


def table_width(widths: list[int], counts: Counter[int], more: int) -> tuple[int, int]:
    """The most common width above 1, or one that begins later and then holds; and its start.

    Args:
        widths: numbers of fields of the head's records.
        counts: how often each number occurs, in the head and in `more` records from later parts.
    """
    held: list[tuple[bool, int, int, int]] = []
    for width, count in counts.items():
        if width > 1:
            start = widths.index(width) if width in widths else len(widths)
            rest = len(widths) - start + more
            held.append((count > 1 and count >= 0.8 * rest, count, width, start))
    commonest = max(held, key=lambda candidate: candidate[1], default=(False, 0, 0, 0))
    best = commonest if commonest[0] else max(held, default=commonest)
    return best[2], best[3] if best[3] < len(widths) else 0


def choose(fits: list[Fit], sample: Sample, options: Options) -> Fit:
    """Choose a delimiter: first one that gives all records the same width above 1; among several
    the one that the file's name suggests, then the most frequent."""
    if options["delimiter"]:
        return fits[0] if fits else read_sample(Dialect(options.character("delimiter")), sample)

    def rank(fit: Fit) -> tuple[bool, bool, int]:
        return fit.delimiter == options.usual, len(fit.delimiter) > 1, fit.cells

    def rank_of_ragged(fit: Fit) -> tuple[bool, float]:
        return fit.delimiter == options.usual, fit.share

    strong = strong_fits(fits, sample, options)
    whole = sorted((fit for fit in strong if fit.clean and not fit.start), key=rank)
    if whole:
        if len(whole) > 1 or whole[-1].delimiter != options.usual:
            note_delimiter(whole, options)
        return whole[-1]
    # In prose, half of the lines may have one comma.
    least = {True: 0.5, False: 0.6}
    ragged = [
        fit for fit in strong
        if fit.width and not fit.start and fit.share >= least[fit.width > 2 or bool(options.usual)]
    ]  # fmt: skip
    ragged.sort(key=rank_of_ragged)
    below = [fit for fit in strong if fit.start and fit.body >= 0.8 and fit.rows_below > 1]
    if options.header_line and MANIFEST.contract:
        below = []  # the table begins with the header that the contract says
    below.sort(key=lambda fit: (fit.rows_below, *rank(fit)))
    if below and (not ragged or below[-1].rows_below > ragged[-1].widths[ragged[-1].width]):
        ragged = below
    if ragged:
        note_delimiter(ragged[-1:], options)
        return ragged[-1]
    if options["header_line"] and strong:
        return max(strong, key=rank_of_ragged)
    return choose_weak(fits, strong, sample, options)


def strong_fits(fits: list[Fit], sample: Sample, options: Options) -> list[Fit]:
    """The fits whose delimiter is not weak, and neither part nor repetition of another one."""
    strong = [fit for fit in fits if not is_weak(fit.delimiter) and not ends_only(fit, options)]
    parts = {
        part for fit in strong for part in fit.delimiter
        if len(fit.delimiter) > 1 and fit.clean
        and part not in sample.head.replace(fit.delimiter, "")
    }  # fmt: skip
    strong = [fit for fit in strong if fit.delimiter not in parts]
    # An empty column turns a single `|` into `||`; then there are single ones elsewhere.
    single = {fit.delimiter: fit.width - 1 for fit in strong if fit.clean}
    return [
        fit for fit in strong
        if all(
            single.get(part, 0) in (0, (fit.width - 1) * fit.delimiter.count(part))
            for part in fit.delimiter
        )
    ]  # fmt: skip


def is_weak(delimiter: str) -> bool:
    """Whether a delimiter counts only if no other one fits."""
    return delimiter in WEAK or (len(delimiter) == 1 and bool(ODD.fullmatch(delimiter)))


def ends_only(found: Fit, options: Options) -> bool:
    """Whether a delimiter only ends the lines, as `~` does in EDI."""
    return (
        found.width == 2
        and len(found.records) > 2
        and found.delimiter != options.usual
        and not any(any(record.fields[1:]) for record in found.records)
    )


def note_delimiter(found: list[Fit], options: Options) -> None:
    best = found[-1]
    shares = f"{best.widths[best.width]} of {best.total} records of a sample"
    others = " and ".join(repr(fit.delimiter) for fit in found[:-1])
    beside = f"; {others} would do as well" if others else ""
    options.guess(f"delimiter {best.delimiter!r}: {shares} have {best.width} fields{beside}")


def choose_weak(fits: list[Fit], strong: list[Fit], sample: Sample, options: Options) -> Fit:
    """Choose among blanks, colons, unusual signs and one column if no strong delimiter fits."""
    for fit in fits:
        name = fit.delimiter
        plain = all(kind_of(record.raw) for record in fit.records[1:])
        if name not in WEAK and (not is_weak(name) or ends_only(fit, options)):
            continue
        if fit.clean and not fit.start and len(fit.records) > 2 and not plain:
            if fit.width > 2 or (not options.usual and name in WEAK):
                note_delimiter([fit], options)
                return fit
            raise options.refuse(
                f"each line has two parts with {name!r} between: one column or two?",
                "delimiter=none", f"delimiter={'space' if name == ' ' else name}",
            )  # fmt: skip
    one = best_fit(NO_DELIMITER, sample, options)
    usual = next((fit for fit in fits if fit.delimiter == options.usual), one)
    other = max((fit.share for fit in strong if fit.width), default=0)
    if options.usual and set(usual.widths) <= {1} and other < 0.5:
        options.guess("one column: no delimiter was found")
        return usual
    if set(one.widths) <= {1} and not any(fit.width for fit in strong):
        raise options.refuse(
            "one column of text is not a table, and no delimiter was found",
            "delimiter=;", "delimiter=none",
        )  # fmt: skip
    if usual.records and usual.records[0].reason:
        line, _, reason, _ = usual.records[0]
        raise options.refuse(f"line {line}, the header, cannot be read: {reason}", "quote=none")
    escape = ["escape=backslash"] if "\\" in sample.head else []
    raise options.refuse(
        "no delimiter splits the lines into the same number of fields",
        f"header_line={sample.first_line}", *escape, "delimiter=;", "delimiter=none",
    )  # fmt: skip


def find_header(found: Fit, sample: Sample, options: Options) -> Layout:
    """Find the header among the first records. Records above it are logged."""
    width = found.width or 1
    start = found.start
    if start:
        check_above(found, sample, options)
    start = below_title(found, start, width)
    line, first, reason, _ = found.records[start]
    for record in found.records[: start + 1]:
        if record.reason:
            raise options.refuse(
                f"line {record.line}, the header or above it, cannot be read: {record.reason}",
                f"header_line={line + bool(reason)}", "quote=none",
            )  # fmt: skip
    first = [cell.replace("\0", "") for cell in first]
    below = [record.fields for record in found.records[start + 1 :] if len(record.fields) == width]
    verdict, why = judge_header(first, below)
    names = commented_names(sample, found.dialect, width - found.trailing)
    if names and verdict != "evident":
        alone = len(sample.comments) == 1 and sample.comments[0][len(sample.comment) :][:1].strip()
        if verdict == "header" and not alone:
            raise options.refuse(
                f"is line {line} the header, or the comment above it?",
                f"header_line={line}", "header_line=none",
            )  # fmt: skip
        options.guess(f"the header is the comment above line {line}")
        return Layout(found.dialect, line, names, len(names), found.trailing, "", False, True)
    if verdict != "none":
        check_below(found, start, below, options)
    parted = found.clean and blank_above(found, start, sample) if start else True
    if verdict in ("none", "header") and not parted:
        verdict, why = "unclear", why or f"it has only text, and so has line {line - 1}"
    if verdict == "unclear" or (verdict == "none" and start):
        raise options.refuse(
            f"is line {line} the header, or is there none? {why}",
            f"header_line={line}", "header_line=none",
        )  # fmt: skip
    log_skipped(found.records[:start], line, sample, options)
    if why:
        result = "no header" if verdict == "none" else f"the header is in line {line}"
        options.guess(f"{result}: {why}")
    header = None if verdict == "none" else first
    return Layout(found.dialect, line, header, width - found.trailing, found.trailing, "", False)


def log_skipped(above: list[Record], line: int, sample: Sample, options: Options) -> None:
    if above:
        options.guess(f"the header is in line {line}; the lines above it are not part of the table")
        for record in above[:20]:
            text = printable(record.raw[:200].rstrip())
            log.info("skipped line %d, above the table: %s", record.line, text)
        if len(above) > 20:
            log.info("skipped %d more records above the table", len(above) - 20)
    elif sample.first_line > 1:
        log.info("skipped everything above line %d", line)


def check_below(found: Fit, start: int, below: list[list[str]], options: Options) -> None:
    """Log, or refuse, a record below the header that may be the header too."""
    line, first, _, _ = found.records[start]
    names = list(map(folded, first))
    for place, later in enumerate(below[: max(0, min(10, len(below) - 2))]):
        if list(map(folded, later)) != names and names_above(below, place):
            break
    else:
        return
    number = next(record.line for record in found.records if record.fields is later)
    if any(kind_of(cell) for cell in first):
        raise options.refuse(
            f"is line {line} the header, or line {number}, which has only names too?",
            f"header_line={line}", f"header_line={number}",
        )  # fmt: skip
    options.guess(
        f"the header is in line {line}, though line {number} has text where columns below it have "
        "numbers or dates"
    )


def check_above(found: Fit, sample: Sample, options: Options) -> None:
    """Refuse to skip lines above the table that may belong to it."""
    line = found.records[found.start].line
    above = found.records[: found.start]
    clear = all(
        len(filled(record.fields)) <= max(1, found.width // 2) or record.raw.startswith(COMMENTS)
        for record in above
    )
    widest = max(len(record.fields) for record in above)
    table = [record.fields for record in above if len(record.fields) == widest]
    if len(table) > 2 and widest > 2 and judge_header(table[0], table[1:])[0] == "evident":
        raise options.refuse(
            f"the lines above line {line} look like another table; one of them can be read",
            f"header_line={above[0].line}", f"header_line={line}",
        )  # fmt: skip
    if not clear and not blank_above(found, found.start, sample):
        last = above[-1]
        raise options.refuse(
            f"line {last.line} has {len(last.fields)} fields, and the lines below have "
            f"{found.width}: which one is the header?",
            *other_quoting(found, sample, options),
            f"header_line={last.line}", f"header_line={line}", "header_line=none",
        )  # fmt: skip


def other_quoting(found: Fit, sample: Sample, options: Options) -> list[str]:
    """Options under which all records would have one width."""
    choices = []
    for name, value in (("quote", "'"), ("escape", "backslash")):
        if not options[name]:
            other = Options(options.name)
            other.chosen = {**options.chosen, name: value}
            if best_fit(found.delimiter, sample, other).quality[0]:
                choices.append(f"{name}={value}")
    return choices


def names_above(rows: list[list[str]], place: int) -> bool:
    """Whether a record has only names, and a column below it has numbers or dates."""
    cells = filled(rows[place])
    if len(cells) < 2 or any(kind_of(cell) or cell.lower() in MISSING for cell in cells):
        return False
    return judge_header(rows[place], rows[place + 1 :])[0] == "evident"


def blank_above(found: Fit, start: int, sample: Sample) -> bool:
    """Whether the line above a record is empty or a comment."""
    line = found.records[start].line - sample.first_line
    above = io.StringIO(sample.head, newline="").readlines()[line - 1]
    return above.startswith(COMMENTS) or not above.strip(found.delimiter + " \t\r\n")


def below_title(found: Fit, start: int, width: int) -> int:
    """The index of the header if the title lines above it are filled up with delimiters."""
    if width < 2:
        return start
    records = [record.fields for record in found.records]
    index = start
    if len(filled(records[start])) <= width // 2:
        while index < len(records) and is_title(records[index], width):
            index += 1
    if index == start or index >= len(records) - 1:
        return start
    rows = [fields for fields in records[index + 1 :] if len(fields) == width]
    columns = list(zip(*rows[:200], strict=True))
    typed = [kind_of_column(cells) for cells in columns]
    first = records[index]
    if len(first) != width or not all(cell.strip() for cell in first):
        return start
    evident = any(typed) and not any(kind_of(cell) for cell in first)
    return index if evident else start


def is_title(fields: list[str], width: int) -> bool:
    """Whether only the first cells hold text, at most half of them."""
    count = len(filled(fields))
    return len(fields) <= width and count <= (width + 1) // 2 and not filled(fields[count:])


def filled(cells: Iterable[str]) -> list[str]:
    """The cells that are not blank, without the white space around them."""
    return [text for cell in cells if (text := cell.strip())]


def commented_names(sample: Sample, dialect: Dialect, width: int) -> list[str] | None:
    """The fields of the last comment above the table if it may be the header: `#id,name`."""
    if not sample.comments or (width == 1 and len(sample.comments) > 1):
        return None
    reader = Reader(lines_of(sample.comments[-1].lstrip(MARK)), dialect)
    _, names, reason, raw = next(reader.records())
    blank = width == 1 and not raw[len(sample.comment) :][:1].strip()
    return None if reason or len(names) != width or blank else names


def kind_of(cell: str) -> str:
    """`number`, `date`, or an empty string for text."""
    cell = cell.strip()
    if DATE.fullmatch(cell):
        return "date"
    return "number" if NUMBER.fullmatch(cell) else ""


def kind_of_column(cells: Iterable[str]) -> str:
    """The kind of at least 90 % of the cells that have a value."""
    kinds = Counter(kind_of(cell) for cell in cells if cell.strip().lower() not in MISSING)
    if not kinds:
        return ""
    kind, count = kinds.most_common(1)[0]
    return kind if count >= 0.9 * kinds.total() else ""


def judge_header(first: list[str], below: list[list[str]]) -> tuple[str, str]:
    """Judge whether the first record is a header.

    Returns:
        the verdict: `evident` if the columns below differ from it, `header` if nothing speaks
        against it, `none`, or `unclear`; and the reason, if the verdict is a guess.
    """
    rows = below[: max(1, min(200, 20_000 // len(first)))]
    kinds = [kind_of(cell) for cell in first]
    other = [row for row in rows if row != first]  # a header may be repeated
    columns = [kind_of_column(cells) for cells in zip(*other, strict=True)] or [""] * len(first)
    against = [
        kind != column
        for kind, column, cell in zip(kinds, columns, first, strict=False)
        if column and cell.strip().lower() not in MISSING
    ]
    typed = [cell.strip() for cell, kind in zip(first, kinds, strict=True) if kind]
    if any(against):
        return "evident", ""
    again = rows.count(first)
    if again > 1 and 4 * again > len(rows):
        return ("none" if typed else "unclear"), f"the same record appears {again} more times"
    if not typed:
        return "header", repeated(first, rows)
    all_typed = len(typed) == len(filled(first))
    if is_series(typed) and (not all_typed or first[0] == "" or years_only(typed, rows)):
        return "header", f"{typed[0]} to {typed[-1]} look like a series of names"
    if not rows:
        return "unclear", f"it is the only record, and has {', '.join(typed[:3])}"
    if all_typed:
        if is_series(typed) and typed[0] == "0":
            return "unclear", "its cells count from 0"
        if not any(columns) and not any(kind_of(cell) for row in rows for cell in row):
            return "unclear", "its cells are numbers or dates, and those below are not"
        return "none", f"the cells of the first record are {kinds[0] or 'data'}s like those below"
    votes = [alike(cell, [row[place] for row in rows]) for place, cell in enumerate(first)]
    why = f"{sum(map(bool, votes))} of its {len(first)} cells are like those below"
    if sum(votes) > 1 and 2 * sum(votes) >= len(typed):
        return "none", why
    return ("unclear" if any(votes) else "header"), why


def alike(cell: str, below: list[str]) -> int:
    """0 to 2: how much a cell looks like those below it, and not like a column's name."""
    cell, kind, cells = cell.strip(), kind_of(cell), filled(below)
    if not cell or not cells:
        return 0
    if kind == "date":
        return 2
    if cell.isdecimal() and cells[:2] == [str(int(cell) + 1), str(int(cell) + 2)]:
        return 2  # the cells below count on from it
    if kind:
        digits = [len(re.sub(r"\D", "", text.partition(".")[0])) for text in (cell, *cells)]
        return int(min(digits[1:]) - 1 <= digits[0] <= max(digits[1:]) + 1)
    shapes = set(map(shape_of, cells))
    same = len(shapes) == 1 and len(cells) > 1 and shape_of(cell) in shapes and len(cell) > 3
    return int(cell in cells or same)


def folded(cell: str) -> str:
    """The cell without regard to case and white space, for comparing names."""
    return " ".join(cell.split()).casefold()


def shape_of(cell: str) -> str:
    """The text with every letter as `a` and every digit as `9`."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", cell))


def repeated(first: list[str], rows: list[list[str]]) -> str:
    """A note if cells of the first record are repeated in their columns, as names rarely are."""
    again = sum(
        bool(cell.strip()) and any(row[place] == cell for row in rows if row != first)
        for place, cell in enumerate(first)
    )
    return f"though {again} of its {len(first)} cells appear again below" if again else ""


def is_series(cells: list[str]) -> bool:
    """Whether cells are ordered years, count from 0 or 1, or rise in equal steps."""
    if not all(re.fullmatch(r"\d{1,8}(\.\d{1,4})?", cell, re.ASCII) for cell in cells):
        return False
    numbers = [float(cell) for cell in cells]
    steps = {round(after - before, 4) for before, after in pairwise(numbers)}
    if len(steps) == 1 and min(steps) > 0:
        return len(numbers) > 2 or (numbers[0] in (0, 1) and steps == {1})
    return all(1700 <= number <= 2200 and number.is_integer() for number in numbers) and (
        all(step > 0 for step in steps) or all(step < 0 for step in steps)
    )


def years_only(typed: list[str], rows: list[list[str]]) -> bool:
    """Whether a record of years is above rows without years."""
    return len(typed) > 1 and len(typed[0]) == 4 and not any(
        re.fullmatch(r"1[7-9]\d\d|2[01]\d\d", cell.strip()) for row in rows for cell in row
    )  # fmt: skip


class Table:
    """The records of the table: rows and rejects."""

    def __init__(self, lines: Lines, layout: Layout) -> None:
        self.layout = layout
        self.reader = Reader(lines, layout.dialect, layout.width + layout.trailing)
        self.number = self.headers = int(layout.commented)
        """Records so far, with the header; and how many of them are the header."""
        self.comments = 0

    def names(self) -> list[str]:
        header = self.layout.header
        return column_names([""] * self.layout.width if header is None else header)

    def records(self) -> Iterator[Judged]:
        """Every record below the header."""
        layout = self.layout
        width, trailing = layout.width, layout.trailing
        header = layout.header if len(filled(layout.header or ())) > 1 else None
        skip_header = layout.header is not None and not layout.commented
        first = header[0].strip().casefold() if header else ""
        comment = layout.comment or NOWHERE
        for line, fields, why, raw in self.reader.records(comment if layout.every_comment else ""):
            other = len(fields) not in (width, width + trailing)
            if (not fields and not why) or (other and raw.startswith(comment)):
                self.comments += 1
                continue
            self.number += 1
            reason = why
            if self.number == 1 and skip_header:
                if "\0" not in raw:
                    self.headers = 1
                    continue
                reason = "NUL characters in the header, left out of the names"
            if trailing and len(fields) == width + 1 and not fields[-1]:
                del fields[-1]
            reason = reason or self._fault(fields, raw)
            again = not reason and header and fields[0].strip().casefold() == first
            if again and list(map(folded, fields)) == list(map(folded, header or ())):
                reason = AGAIN
            yield line, self.number, fields, reason, raw[:RAW_CHARACTERS] if reason else raw

    def _fault(self, fields: list[str], raw: str) -> str:
        """The reason to reject a record; empty if it is a row."""
        if "\0" in raw:
            return "a NUL character"
        if len(fields) != self.layout.width:
            fields_text = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            return f"{fields_text} where the header has {self.layout.width}"
        if not raw.isascii() and UNDECODABLE.search(raw):
            return "bytes that are not in the encoding of the file"
        if len(raw) > RECORD_CHARACTERS:
            return f"more than {RECORD_CHARACTERS} characters"
        return ""


class Block:
    """Records of the table without a fault, as columns of text."""

    def __init__(
        self, text: str, line: int, record: int, columns: list[pa.Array], quote: str
    ) -> None:
        self._text = text
        self._line = line
        self._quote = quote or NOWHERE
        self.columns = columns
        self.count = len(columns[0])
        self.records = range(record, record + self.count)
        self.end = line + count_lines(text)
        """The line after the last one."""

    @property
    def is_whole(self) -> bool:
        """Whether there are as many records as the text has."""
        return self._one_each or len(self._places) == self.count

    @property
    def lines(self) -> Sequence[int]:
        """The line where each record starts."""
        if self._one_each:
            return range(self._line, self.end)
        return [self._line + first for first, _ in self._places]

    def raw_of(self, index: int) -> str:
        """The text of a record."""
        if self._one_each:
            return self._texts[index]
        first, end = self._places[index]
        return "".join(self._texts[first:end])

    def starts(self) -> list[str]:
        """The first line of each record."""
        if self._one_each:
            return self._texts
        return [self._texts[first] for first, _ in self._places]

    @property
    def _one_each(self) -> bool:
        """Whether every line is a record: none is empty, and none has a part of one."""
        return self._line + self.count == self.end

    @cached_property
    def _texts(self) -> list[str]:
        return io.StringIO(self._text, newline="").readlines()

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Where each record starts and ends, in lines of the text: quotes are in pairs."""
        places, first, within = [], 0, False
        for index, line in enumerate(self._texts):
            if not within:
                first = index
            within ^= line.count(self._quote) % 2 == 1
            if not within and (index > first or line.rstrip("\r\n")):
                places.append((first, index + 1))
        return places


class Blocks:
    """Reads a table's records block by block.

    Arrow splits a block at once if that gives the same as `Table.records`: quotes only enclose
    fields, all records have the table's width, and nothing in it is to be rejected or skipped.
    """

    def __init__(self, lines: Lines, table: Table) -> None:
        self._lines, self._table = lines, table
        self._text, self._at = "", 0
        self._is_over = False
        layout, dialect = table.layout, table.layout.dialect
        self._most = max(BLOCK_CHARACTERS, min(COLUMN_CHARACTERS * layout.width, 16 << 20))
        self._size = self._most
        self._is_able = len(dialect.delimiter) == 1 and dialect.delimiter.isascii() and not (
            dialect.quote not in ('"', "") or dialect.escape or dialect.blanks
        )  # fmt: skip
        if self._is_able:
            edge = re.escape(dialect.delimiter)
            field = f'(?:"(?:[^"]|"")*"|[^"{edge}\r\n]*)'
            self._tidy = rf"\A(?:{field}(?:{edge}{field})*(?:\r\n|\n|\r))*\z"
            names = [str(place) for place in range(layout.width + layout.trailing)]
            self._how = {
                "read_options": arrow_csv.ReadOptions(
                    column_names=names, use_threads=False, block_size=1 << 30
                ),
                "parse_options": arrow_csv.ParseOptions(
                    delimiter=dialect.delimiter,
                    quote_char=dialect.quote or False,
                    newlines_in_values=True,
                ),
                "convert_options": arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    check_utf8=False,
                    strings_can_be_null=False,
                    null_values=[],
                ),
            }

    def __iter__(self) -> Iterator[Block | list[Judged]]:
        """Every record below the header: a block, or records of which some may have a fault."""
        records = self._table.records()
        stop = self._lines.number + 1 if self._is_able else EVERY
        while True:
            yield from batches(self._one_by_one(records, stop), lambda record: len(record[4]))
            if self._is_over:
                return
            while block := self._block():
                yield block
            stop = self._lines.number + max(1, count_lines(self._piece()))
            self._lines.put_back(self._text[self._at :])
            self._text, self._at = "", 0

    def _one_by_one(self, records: Iterator[Judged], stop: int) -> Iterator[Judged]:
        """The records up to a line."""
        for record in records:
            yield record
            if self._lines.number >= stop:
                return
        self._is_over = True

    def _block(self) -> Block | None:
        """The records that come next, if Arrow may split them."""
        lines, table = self._lines, self._table
        while piece := self._piece():
            columns = self._columns(piece)
            if columns:
                quote = table.layout.dialect.quote
                block = Block(piece, lines.number + 1, table.number + 1, columns, quote)
                if block.is_whole:
                    self._at += len(piece)
                    self._size = min(2 * self._size, self._most)
                    lines.number = block.end - 1
                    table.number += block.count
                    return block
            if self._size <= SMALL_BLOCK:
                return None
            self._size = max(SMALL_BLOCK, self._size // 16)
        return None

    def _piece(self) -> str:
        """About as much text as a block may have, from here to where a record ends."""
        size = self._size
        while len(self._text) - self._at < size and (more := self._lines.read(self._most)):
            self._text, self._at = self._text[self._at :] + more, 0
        text, at = self._text, self._at
        end = len(text)
        if end - at > size:
            end = line_end(text, at, at + size)
            ends = [place for sign in "\r\n" if (place := text.find(sign, at + size)) >= 0]
            end = end or (line_end(text, at, min(ends) + 1) if ends else len(text))
        quote = self._table.layout.dialect.quote
        for _ in range(BACKWARDS):
            if not quote or text.count(quote, at, end) % 2 == 0:
                return text[at:end] if end - at <= RECORD_CHARACTERS else ""
            end = line_end(text, at, text.rfind(quote, at, end))
        return ""

    def _columns(self, piece: str) -> list[pa.Array] | None:
        """The columns of a piece; None if it is not for Arrow to split."""
        layout = self._table.layout
        if "\0" in piece or MARK in piece or (layout.every_comment and self._commented(piece)):
            return None
        text = piece if piece.endswith(("\n", "\r")) else piece + "\n"
        try:
            data = text.encode()
        except UnicodeEncodeError:  # bytes that are not in the file's encoding
            return None
        quote = layout.dialect.quote
        if quote and quote in text and not pc.match_substring_regex(text, self._tidy).as_py():
            return None
        try:
            found = arrow_csv.read_csv(pa.BufferReader(data), **self._how)
        except pa.ArrowInvalid:
            return None
        columns = [column.combine_chunks() for column in found.columns]
        if layout.trailing and pc.any(pc.not_equal(columns.pop(), "")).as_py():
            return None
        return None if self._has_header(columns) else columns

    def _commented(self, piece: str) -> bool:
        comment = self._table.layout.comment
        return piece.startswith(comment) or f"\n{comment}" in piece or f"\r{comment}" in piece

    def _has_header(self, columns: list[pa.Array]) -> bool:
        """Whether a record may repeat the header."""
        header = self._table.layout.header or []
        if len(filled(header)) < 2:
            return False
        at = None
        for name, column in zip(header, columns, strict=True):
            cells = column if at is None else column.take(at)
            start = next(iter(folded(name).split()), "")
            alike = pc.starts_with(pc.ascii_lower(pc.ascii_ltrim(cells, WHITE_SPACE)), start)
            alike = pc.or_(alike, pc.invert(pc.string_is_ascii(cells)))
            places = pc.indices_nonzero(alike)
            at = places if at is None else at.take(places)
            if not len(at):
                return False
        return True


class Taking:
    """Hands a table's file to the intake, which types and publishes it by the contract."""

    def __init__(self, intake: Intake, lines: Lines, layout: Layout, encoding: str) -> None:
        self._intake, self._lines, self._layout = intake, lines, layout
        self._encoding = encoding
        self._has_ended = False
        self._last: tuple[Block | list[Judged], int] = ([], 0)
        """The last records above the footer are so many of this part."""

    def all(self) -> None:
        """Take in the whole file."""
        intake, lines, layout = self._intake, self._lines, self._layout
        above = 0
        last = deque[str](maxlen=ABOVE_LINES)
        texts = (line for line in lines.upto(layout.line - 1) if line.strip("\r\n" + MARK))
        for some in batches(texts, len):
            above += len(some)
            intake.skip("preamble", some)
            last.extend(some)
        if layout.commented:
            intake.skipped["preamble"] -= 1
            above -= 1
        first = lines.take()
        lines.again([first])
        table = Table(lines, layout)
        intake.start(table.names())
        marks = ("#", "//", layout.comment or NOWHERE)
        text = "".join(line for line in last if not line.startswith(marks))
        found = Reader(lines_of(text), layout.dialect, layout.width).records() if text else iter(())
        intake.check_above([(raw, fields) for _, fields, why, raw in found if not why], layout.line)
        for part in Blocks(lines, table):
            self._take(part)
        intake.skipped["comment"] += table.comments
        read = above + table.number - table.headers + table.comments
        intake.finish(read, self._facts(table.names(), first, above))

    def _take(self, part: Block | list[Judged]) -> None:
        intake = self._intake
        starts = []
        if self._has_ended or "footer" in intake.dialect:
            starts = starts_of(part)
        end = 0 if self._has_ended else intake.first("footer", starts)
        if end >= 0:
            self._has_ended = True
            self._skip(part, end, starts)
        else:
            end = part.count if isinstance(part, Block) else len(part)
        if not end:
            return
        self._last = part, end
        if isinstance(part, Block):
            columns = [column.slice(0, end) for column in part.columns]
            intake.columns(columns, part.lines[:end], part.records[:end], part.raw_of)
            return
        some = part[:end]
        intake.skip("header", [raw for *_, reason, raw in some if reason == AGAIN])
        intake.rows(
            self._layout.width,
            [(line, number, fields, raw) for line, number, fields, reason, raw in some
             if not reason],
            [(line, number, reason, raw) for line, number, _, reason, raw in some
             if reason and reason != AGAIN],
        )  # fmt: skip

    def _skip(self, part: Block | list[Judged], end: int, starts: list[str]) -> None:
        """Skip the records from the footer on."""
        self._intake.skip("footer", starts[end:])
        if isinstance(part, Block):
            columns = [column.slice(end) for column in part.columns]
            self._intake.check_below(columns, part.lines[end:], starts[end:])
            return
        good = [(line, fields, start) for (line, _, fields, reason, _), start
                in zip(part[end:], starts[end:], strict=True) if not reason]  # fmt: skip
        if good:
            lines, fields, starts = zip(*good, strict=True)
            self._intake.check_below(columns_of(fields), lines, starts)

    def _facts(self, names: list[str], first: str, above: int) -> dict[str, Any]:
        """What a survey tells of the file besides its rows."""
        layout, dialect = self._layout, self._layout.dialect
        named = {sign: word for word, sign in DELIMITER_NAMES.items()}
        delimiter = "none" if dialect.delimiter == NO_DELIMITER else dialect.delimiter
        if not delimiter.isprintable() or delimiter == " ":
            delimiter = named.get(delimiter, delimiter.encode("unicode_escape").decode())
        words = {"delimiter": delimiter}
        if dialect.quote != '"':
            words["quote"] = dialect.quote or "none"
        if dialect.blanks:
            words["blanks"] = "skip"
        if layout.header is None:
            words["header_line"] = "none"
        part, end = self._last
        if isinstance(part, Block):
            begin = max(0, end - ABOVE_LINES)
            cells = [column.slice(begin, end - begin).to_pylist() for column in part.columns]
            rows = zip(*cells, strict=True)
            last = list(zip(part.starts()[begin:end], rows, strict=True))
        else:
            last = [(raw, None if reason else fields) for _, _, fields, reason, raw in part[:end]]
        suggest = {"footer": self._intake.footer_of(last, dialect.delimiter)}
        if above and layout.header is not None and not layout.commented:
            suggest["header"] = label(first, dialect.delimiter, 2)
        return {
            "reader": "delimited",
            "encoding": f"{self._encoding}{' (a guess)' if self._intake.is_guessed else ''}",
            "dialect": words,
            "header_line": layout.line if layout.header is not None else 0,
            "names": names,
            "suggest": {word: text for word, text in suggest.items() if text},
        }


def starts_of(part: Block | list[Judged]) -> list[str]:
    """The first line of each record."""
    if isinstance(part, Block):
        return part.starts()
    return [re.split("[\r\n]", raw, maxsplit=1)[0] for *_, raw in part]
