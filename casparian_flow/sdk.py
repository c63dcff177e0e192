"""What a plugin imports: `BasePlugin`, `PluginMetadata`, and helpers for reading files.

A plugin is one Python file with a `MANIFEST` and a class `Handler`:

    from casparian_flow.sdk import BasePlugin, PluginMetadata
    import pandas as pd

    MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])

    class Handler(BasePlugin):
        def execute(self, file_path: str):
            self.publish("sales_data", pd.read_csv(file_path))

Uses the standard library only, because a copy of this file is imported in the plugin's process.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

_MAGIC = (
    (b"\x1f\x8b", "a gzip file"),
    (b"\x1f\x9d", "a file packed with compress"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\0", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x04\x22\x4d\x18", "an LZ4 file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a file of an older Office (an Excel .xls?)"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "an RTF document"),
    (b"%!PS", "a PostScript document"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"FEA1", "a Feather file"),
    (b"ORC", "an ORC file"),
    (b"Obj\x01", "an Avro file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\0", "a SQLite database"),
    (b"\0\x01\0\0Standard ", "an Access database"),
    (b"ElfFile\0", "a Windows event log (.evtx)"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"\x7fELF", "a program"),
    (b"\0\x05\x16\x07", "an AppleDouble file, which macOS writes beside another file"),
    (b"\0\x05\x16\0", "an AppleSingle file"),
    (b"MSH|^~\\&", "HL7"),
    (b"UNA:+", "EDIFACT"),
    (b"UNB+", "EDIFACT"),
    (b"BEGIN:VCALENDAR", "an iCalendar file"),
    (b"BEGIN:VCARD", "a vCard file"),
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the file's content"),
)
_HTML = re.compile(
    r"(?:<!--.*?-->\s*)*<(?:!doctype\s+html|(?:html|head|body|table|title|meta|div|script)\b[^>]*>"
    r"(?!\s*[,;|\t]))",
    re.IGNORECASE | re.DOTALL,
)
_XML = re.compile(
    r"<\?xml\b|(?:<!--.*?-->\s*)*(?:<!doctype\s|<[A-Za-z_][\w:.-]*(?:\s[^<>]*)?>\s*<)",
    re.DOTALL,
)
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")


@dataclass(frozen=True, kw_only=True)
class PluginMetadata:
    """A plugin's description. It is read from the source without running it.

    Use literals only: strings, numbers, True, False, None, lists, tuples and dicts.
    """

    pattern: str | Sequence[str]
    """A glob, or several. Without a slash it matches the file name at any depth."""

    topic: str | Sequence[str] = ()
    """The plugin's named outputs, one or several. Topics in `sinks` need not be repeated here."""

    priority: int = 0
    """Order of jobs; higher runs first."""

    subscriptions: Sequence[str] = ()
    """Tags of routing rules. The plugin also gets the files that these rules tag."""

    sinks: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Topic -> sink URI, or several, such as `parquet://output` or
    `sqlite:///tables.sqlite3?mode=replace`."""

    name: str = ""
    """The plugin's name; the file's name without `.py` where empty."""

    version: str = ""
    """The plugin's version (PEP 440); `casparian publish --version` overrides it."""

    timeout_seconds: float = 0.0
    """Wall clock limit of one attempt. It can only lower the configured limit, which 0 means."""

    memory_bytes: int = 0
    """Limit of the process's address space. It can only lower the configured limit, which 0
    means."""

    scratch_bytes: int = 0
    """Space for temporary files, in the folder that `tempfile` uses; 0: nothing can be written.
    The configuration may grant less."""

    network: bool = False
    """Whether the plugin needs the network. The configuration must allow it too."""

    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    """Options and their default values. `casparian publish plugin.py --option delimiter=";"`
    replaces a value here before the plugin is signed. The plugin reads `MANIFEST.options`."""

    contract: Mapping[str, Any] = field(default_factory=dict)
    """What a table is: its files, its columns and their types, and what becomes of the rest. A
    plugin with a contract is a table; `casparian table add` writes it."""

    catch_all: bool = False
    """Whether the plugin reads any file of its kind. It does not get the files of a table, and is
    none itself once it has a contract."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """The file that a job processes, as the ledger has it."""

    path: str
    """Path of the bytes in this attempt: a private copy with the original name."""

    rel_path: str
    """Path of the file under its source root, with POSIX separators."""

    source: str
    """Name of the source root."""

    content_hash: str
    """SHA-256 of the bytes, hexadecimal."""

    size_bytes: int
    version_id: int
    job_id: int


class BasePlugin:
    """Base class of a plugin's `Handler`. One instance processes many files, one after another."""

    file: FileInfo
    """The file of the current `execute` call."""

    _publish: Callable[[str, Any], None]

    def execute(self, file_path: str) -> None:
        """Read one file and publish its rows. An exception fails the job.

        Args:
            file_path: path of the file's bytes; the file has its original name.
        """
        raise TypeError(f"{type(self).__name__} has no method execute(self, file_path)")

    def publish(self, topic: str, data: Any) -> None:
        """Send rows to a topic. May be called many times; the columns must stay the same.

        Args:
            topic: one of the plugin's declared topics.
            data: a pandas DataFrame, a pyarrow Table, RecordBatch or RecordBatchReader, anything
                with the Arrow C stream protocol (polars, DuckDB), or an iterator of these.
                Rows are sent in batches and not kept in memory.

        Raises:
            TypeError: `data` is not tabular.
            ValueError: the topic is not declared, or the columns changed between calls.
        """
        self._publish(topic, data)


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedIOBase]:
    """Open a file's bytes for reading. A gzip file is unpacked, whatever its name.

    Raises:
        ValueError: the gzip file is damaged; raised when reading reaches the damage.
    """
    try:
        with open(path, "rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            with gzip.GzipFile(fileobj=file) if packed else file as opened:
                yield opened
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the gzip file is damaged: {error}") from error


def foreign_kind(start: bytes) -> str:
    """Recognise, by its first bytes, a file of another kind than text or a table.

    Args:
        start: the first kilobytes of the file, after unpacking gzip.

    Returns:
        words for a message, such as `a PDF document`; empty if nothing is recognised.
    """
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return _zip_kind(start)
    for magic, kind in _MAGIC:
        # Text may begin with the letters of a magic number, as a column `ORC` does.
        if start.startswith(magic) and (not magic.isalnum() or _CONTROL.search(start)):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive"
    if re.match(rb"ISA([^\w\s])\d\d\1.{10}\1\d\d\1.{10}\1", start):
        return "X12 EDI"
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = start[:8192].decode(encoding, "replace").lstrip()
    if _HTML.match(text):
        return "an HTML page"
    return "XML" if _XML.match(text) else ""


def _zip_kind(start: bytes) -> str:
    if b"vnd.oasis.opendocument" in start[:200]:
        return "an OpenDocument file (an .ods workbook?)"
    if b"word/" in start:
        return "a ZIP file (a Word document?)"
    return "a ZIP file (an Excel workbook?)"


def column_names(cells: Iterable[str | None], taken: Iterable[str] = ()) -> list[str]:
    """Turn header cells into column names that every sink accepts.

    Runs of white space become one space, an empty cell becomes `column_3` (its position), a
    repeated name `name_2` (case is ignored), `_cf_x` becomes `x_cf_x`, and names are cut to 100
    characters.

    Args:
        taken: names of the table's other columns, which no cell gets.
    """
    names: list[str] = []
    seen = {name.casefold() for name in taken}
    last: dict[str, int] = {}  # else thousands of equal cells would take a square of tries
    for position, cell in enumerate(cells, start=1):
        base = printable(" ".join((cell or "").split()))[:100] or f"column_{position}"
        base = f"x{base}" if base.lower().startswith("_cf_") else base
        name, count = base, last.get(base.casefold(), 1)
        while name.casefold() in seen:
            count += 1
            name = f"{base}_{count}"
        last[base.casefold()] = count
        seen.add(name.casefold())
        names.append(name)
    return names


def own_publish(plugin: str, name: str, *choices: str) -> str:
    """The command that publishes a bundled plugin once more, for one file and files named like it.

    These files get topics of their own: the plugin that is published already may read some of them
    too, and one topic would hold their rows twice.

    Args:
        plugin: name of the plugin's file, without `.py`.
        name: name of the file that could not be read.
        choices: options such as `delimiter=;`; each one alone makes the file readable.
    """
    stem, dot, suffix = name.partition(".")
    own = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_") or "table"
    own += "_files" if own == plugin or own == plugin.partition("_")[0] else ""
    glob = re.sub(r"[\[\]{}()!?*\\]", "?", stem)
    if re.match("[A-Za-z]{2}", glob):  # else the pattern would be that of nearly all files
        glob = re.sub(r"\d+", "*", glob).rstrip("*") + "*"
    glob += dot + suffix
    command = (
        f"casparian publish {plugin} --name {own} --pattern {shlex.quote(glob)} "
        f"--topic {own} --topic {own}_rejects"
    )
    options = ", or with ".join(f"--option {shlex.quote(choice)}" for choice in choices)
    return f"{command} {options}".rstrip()


def printable(text: str) -> str:
    """Escape characters that no sink can store: NUL as `\\x00`, lone surrogates as `\\udcNN`."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def batches(
    items: Iterable[T], size: Callable[[T], int], *, rows: int = 5000, total: int = 16 << 20
) -> Iterator[list[T]]:
    """Group items into lists of `rows`, or fewer once their sizes add up to more than `total`.

    Args:
        size: the size of an item, in the unit of `total`.
    """
    batch: list[T] = []
    sizes = 0
    for item in items:
        batch.append(item)
        sizes += size(item)
        if len(batch) == rows or sizes > total:
            yield batch
            batch, sizes = [], 0
    if batch:
        yield batch
