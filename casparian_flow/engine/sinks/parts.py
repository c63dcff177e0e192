"""The files of an output: one Parquet file or, for a large output, a folder of parts.

A part is closed once it reaches the limit, so it exceeds the limit by one row group at most. The
parts are `part-00000.parquet` and so on, in the order of the rows. Each footer has the facts of the
output and its own number, `part`. The last footer (or the only one) also has `parts`, `rows` and
`batches` of the whole output.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    facts_of,
    is_disk_fault,
    output_of,
    own_topic,
)
from casparian_flow.engine.sinks.topic_schema import (
    EXACT_IN_DOUBLE,
    LINEAGE_FIELDS,
    fit,
    is_exact,
    is_within,
    own_columns,
    widened,
)
from casparian_flow.errors import SinkConflict

GROUP_ROWS = 128 << 10
"""Rows of a row group."""

_OURS = b"casparian."


class Footer(NamedTuple):
    """The facts in the footers of an output's files."""

    facts: dict[str, str]
    rows: int


class Parts:
    """The file or files of one output while it is written.

    Args:
        path: path of the file; it must not exist. The attribute `path` names a folder from the
            second part on.
        limit: size in bytes at which a part is closed; 0: everything goes into one file.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._limit = limit
        self._count = 0
        self._full = False
        self._writer: Any = None
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        crashpoint("stage.made")
        try:
            # Arrow's own file object: Arrow calls back into a Python one for every few bytes.
            self._file = pa.OSFile(str(path), "wb")
        except OSError:
            path.unlink()  # no caller knows the file yet
            raise

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._writer is not None

    @property
    def open(self) -> bool:
        """Whether rows can still be written."""
        return self.begun and bool(self._writer.is_open)

    def begin(self, schema: Any) -> None:
        """Set the columns; the schema's metadata becomes the facts in every footer.

        Raises:
            OSError, pa.ArrowException: they cannot be stored, or the disk refused. So do `write`
                and `close`.
        """
        self._schema = schema
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", compression_level=1)

    def write(self, table: Any) -> None:
        """Append rows to the file; they are not durable yet."""
        if self._full:
            self._turn()
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._full = 0 < self._limit <= self._file.tell()
        crashpoint("stage.written")

    def close(self, figures: Mapping[str, object]) -> None:
        """Write the last footer, with these additional facts."""
        if self._count:
            figures = {**figures, "part": self._count, "parts": self._count + 1}
        self._end(figures)
        crashpoint("stage.finished")

    def discard(self) -> None:
        """Remove the files. May be called at any time, and more than once."""
        if self.open:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._writer.close()
            self._writer.is_open = False  # else its finalizer would write to the closed file
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            durable.remove(self.path)

    def _end(self, facts: Mapping[str, object]) -> None:
        metadata = {f"casparian.{fact}": str(value) for fact, value in facts.items()}
        self._writer.add_key_value_metadata(metadata)
        self._writer.close()
        self._file.close()

    def _turn(self) -> None:
        """Begin another part. The first one is moved into a new folder."""
        self._end({"part": self._count})
        if not self._count:
            file, self.path = self.path, self.path.with_name(f"{self.path.name}s")
            self.path.mkdir()
            file.rename(_part(self.path, 0))
        crashpoint("stage.part_finished")
        self._count += 1
        self._file = pa.OSFile(str(_part(self.path, self._count)), "wb")
        self.begin(self._schema)


def files(path: Path) -> list[Path]:
    """The files of an output, in the order of its rows.

    Raises:
        OSError: the output is gone, or cannot be read.
    """
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _opened(path: Path) -> Iterator[Any]:
    """Each file of an output, open until the next is asked for."""
    for file in files(path):
        with file.open("rb") as opened, pq.ParquetFile(opened) as source:
            yield source


def own_schema(path: Path) -> Any:
    """The columns of an output, without the lineage columns.

    Raises:
        OSError, pa.ArrowException, IndexError: it cannot be read, or is damaged.
    """
    with files(path)[0].open("rb") as file:  # given a path, Arrow's errors lack the errno
        return own_columns(pq.read_schema(file))


def size(path: Path) -> int:
    """Size of an output's files in bytes. Raises OSError as `files`."""
    return sum(file.stat().st_size for file in files(path))


def digest(path: Path) -> str:
    """SHA-256 of an output, hexadecimal: of a file's bytes, or of the SHA-256 digests (32 bytes
    each) of a folder's files in the order of their names.

    Raises:
        OSError: the output cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(b"".join(bytes.fromhex(digest(p)) for p in files(path))).hexdigest()


def make_durable(path: Path) -> None:
    """Fsync an output's files, and its folder if it has one.

    Raises:
        OSError: the disk refused, and the data may be lost.
    """
    for file in files(path):
        durable.fsync_path(file)
        crashpoint("stage.synced")
    if path.is_dir():
        durable.fsync_path(path)
        crashpoint("stage.folder_synced")


def read_footer(path: Path) -> Footer:
    """Read the facts of a finished output.

    Raises:
        ValueError, pa.ArrowException: these are not the files of one output of ours.
        OSError: the output is gone, or cannot be read.
    """
    footers = []
    for file in files(path):
        with file.open("rb") as opened:  # given a path, Arrow's errors lack the errno
            footers.append(pq.read_metadata(opened))
    facts = [facts_of(footer.metadata or {}) for footer in footers]
    if path.is_dir() and (
        [fact.get("part") for fact in facts] != [str(number) for number in range(len(facts))]
        or len({fact.get("output_key") for fact in facts}) != 1
        or facts[-1].get("parts") != str(len(facts))
    ):
        raise ValueError("some parts of the output are missing")
    return Footer(facts[-1], sum(footer.num_rows for footer in footers))


def footer_of(path: Path) -> Footer | None:
    """The footer of an output of ours; None if something else is there, or nothing.

    Raises:
        OSError: the disk refused to read it.
    """
    try:
        footer = read_footer(path)
        return footer if "output_key" in footer.facts and "job_id" in footer.facts else None
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_disk_fault(error) and not isinstance(error, FileNotFoundError | IsADirectoryError):
            raise
        return None


def names(path: Path, output_key: str) -> bool:
    """Whether a file's footer names this output. Raises OSError as `footer_of`."""
    footer = footer_of(path)
    return footer is not None and footer.facts["output_key"] == output_key


def rewritten(path: Path, topic: str, columns: Any) -> Path:
    """Write a durable copy of a finished output beside it, with other columns and the same facts.

    Args:
        columns: all columns of the output, the lineage columns, and perhaps more.

    Raises:
        OutputRefused: a value would change in the new type of its column.
        OSError: the disk refused.
    """
    copy = path.with_name(f"{path.name}.fitted")
    durable.remove(copy)  # left by a process that crashed
    if path.is_dir():
        copy.mkdir()
    for file, source in zip(files(path), _opened(path), strict=True):
        facts = {k: v for k, v in (source.metadata.metadata or {}).items() if k[:10] == _OURS}
        schema = columns.with_metadata(facts)
        settles = own_topic(output_of("", facts_of(facts)))
        target = copy / file.name if path.is_dir() else copy
        with pq.ParquetWriter(target, schema, compression="zstd", compression_level=1) as writer:
            for number in range(source.num_row_groups):
                table = fit(topic, source.read_row_group(number), schema, settles)
                writer.write_table(table, row_group_size=GROUP_ROWS)
    make_durable(copy)
    durable.fsync_path(copy.parent)
    return copy


def are_exact(path: Path, name: str, kind: Any) -> bool:
    """Whether every value in a number column of a finished output fits another type exactly.

    Raises:
        OSError, pa.ArrowException: the output cannot be read.
    """
    for source in _opened(path):
        number = _leaf(source, name)
        for group in range(source.num_row_groups):
            column = source.read_row_group(group, columns=[name]).column(0)
            if number is None or not is_exact(column, kind):
                return False
    return True


def are_within_double(outputs: Iterable[Path], name: str) -> bool:
    """Whether a double holds every value in an integer column of finished outputs.

    Reads the statistics of the files; without them, or if a file cannot be read as Parquet, the
    answer is False.

    Raises:
        OSError: the disk refused to read a file.
    """
    try:
        return all(_is_within_double(file, name) for path in outputs for file in _opened(path))
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise
        return False


def united(outputs: Sequence[Path]) -> tuple[Any, list[int]]:
    """The columns that readers of finished outputs need, those of the first ones first.

    Returns:
        the columns, and the places in the list of outputs that cannot be read with them.

    Raises:
        OSError, pa.ArrowException: an output cannot be read.
    """
    own = list(map(own_schema, outputs))
    columns = pa.schema([])
    for each in own:
        columns = widened(columns, each)
    misfits = [
        number
        for number, (output, each) in enumerate(zip(outputs, own, strict=True))
        if not all(_reads(output, field, columns.field(field.name)) for field in each)
    ]
    return columns, misfits


def _reads(output: Path, field: Any, column: Any) -> bool:
    """Whether a reader of a column takes a file's one for it, and every value exactly."""
    is_cast = pa.types.is_integer(field.type) and pa.types.is_floating(column.type)
    return is_within(field.type, column) and (
        not is_cast or are_within_double([output], field.name)
    )


def _is_within_double(source: Any, name: str) -> bool:
    number = _leaf(source, name)
    for group in range(source.num_row_groups) if number is not None else ():
        column = source.metadata.row_group(group).column(number)
        stats = column.statistics if column.is_stats_set else None
        if stats is None or not stats.has_min_max:
            if stats is None or stats.null_count != column.num_values:
                return False
        elif not -EXACT_IN_DOUBLE <= stats.min <= stats.max <= EXACT_IN_DOUBLE:
            return False
    return True


def _leaf(source: Any, name: str) -> int | None:
    """The index of a file's column of integers or floating point; None if it has no such column."""
    schema = source.schema_arrow
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    leaves = (n for n in range(len(source.schema)) if source.schema.column(n).path == name)
    return next(leaves, None)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.parquet"


# `_common_metadata` in a topic's folder is a Parquet file without rows. It has the columns of all
# outputs of the topic, united by `topic_schema`, and the lineage columns last. It is written before
# the first file with new columns, so it covers every file. If it is missing (an earlier release
# wrote none, or a user deleted it), the outputs' footers give the same columns.


COLUMNS_FILE = "_common_metadata"
"""Parquet readers look for the common columns of a folder's files under this name."""

_OUR_TOPIC = b"casparian.topic"


def has_topic_columns(folder: Path) -> bool:
    """Whether the folder has a `_common_metadata`."""
    return os.path.lexists(folder / COLUMNS_FILE)


def topic_columns(folder: Path) -> Any:
    """A topic's columns so far, as an Arrow schema without the lineage columns.

    Raises:
        SinkConflict: `_common_metadata` is not ours.
        OSError: the disk refused to read it.
    """
    try:
        with (folder / COLUMNS_FILE).open("rb") as file:
            schema = pq.read_schema(file)
    except (FileNotFoundError, NotADirectoryError):
        return _columns_of_outputs(folder)
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error) and not (folder / COLUMNS_FILE).is_dir():
            raise
        raise _foreign(folder) from error
    if _OUR_TOPIC not in (schema.metadata or {}):
        raise _foreign(folder)
    return own_columns(schema)


def set_topic_columns(folder: Path, schema: Any) -> None:
    """Replace the topic's columns; durable when this returns.

    Args:
        schema: without the lineage columns.

    Raises:
        OSError: the disk refused; nothing was changed.
    """
    whole = pa.schema([*schema, *LINEAGE_FIELDS], {_OUR_TOPIC: folder.name.encode()})
    data = io.BytesIO()
    pq.write_metadata(whole, data)
    durable.write_once(folder / COLUMNS_FILE, data.getvalue())
    crashpoint("parquet.columns_written")


def list_outputs(folder: Path) -> Iterator[Path]:
    """The files, and folders of parts, in a topic's folder that are named like outputs.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = entry.name.removesuffix(".parquet")
        if len(name) == KEY_DIGITS and not name.startswith((".", "_")):
            yield entry


def _columns_of_outputs(folder: Path) -> Any:
    """The columns in the outputs' footers, united in the order of their jobs."""
    found = []
    for output in list_outputs(folder):
        with contextlib.suppress(FileNotFoundError, ValueError):  # one that moves meanwhile
            if footer := footer_of(output):
                found.append((int(footer.facts["job_id"]), output.name, own_schema(output)))
    united = pa.schema([])
    for _, _, schema in sorted(found, key=lambda each: each[:2]):
        united = widened(united, schema)
    return united


def _foreign(folder: Path) -> SinkConflict:
    return SinkConflict(
        f"{folder / COLUMNS_FILE} was not made by Casparian Flow; it was left untouched",
        "move it elsewhere, then retry the job: the file is made again from the outputs",
    )
