"""An output on disk: one Parquet file; or, where it is large, a folder of parts.

A part is closed when it has reached a limit, so it is larger than that by a row group at the most.
The parts of an output are `part-00000.parquet` and so on, in the order of its rows. The footer of
each has the facts of the output, its `part` says which it is; the last one's `parts`, `rows` and
`batches` speak of the whole output, as does the only file of one that is not split.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import base
from casparian_flow.engine.sinks.base import facts_of, is_disk_fault, own_topic
from casparian_flow.engine.sinks.topic_schema import (
    EXACT_IN_DOUBLE,
    LINEAGE_FIELDS,
    fit,
    is_exact,
    own_columns,
    widened,
)
from casparian_flow.errors import SinkConflict

GROUP_ROWS = 128 << 10
"""Rows of a row group."""

_OURS = b"casparian."


class Footer(NamedTuple):
    """What an output's files say of it."""

    facts: dict[str, str]
    rows: int


class Parts:
    """The file or files of one output, while it is written.

    Args:
        path: of the file; it must not exist. `path` names a folder once there are several.
        limit: bytes of a part after which another is begun; 0: there is one file, however large.

    Raises:
        OSError: the file cannot be made.
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
            # Arrow's own file: a Python one would be called back for every few bytes.
            self._file = pa.OSFile(str(path), "wb")
        except OSError:
            path.unlink()  # nobody else knows it
            raise

    @property
    def begun(self) -> bool:
        """Whether it has columns."""
        return self._writer is not None

    @property
    def open(self) -> bool:
        """Whether rows may still come."""
        return self.begun and bool(self._writer.is_open)

    def begin(self, schema: Any) -> None:
        """Say its columns; the schema's metadata are the facts of every footer.

        Raises:
            OSError, pa.ArrowException: they cannot be stored, or the disk refused; as below.
        """
        self._schema = schema
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", compression_level=1)

    def write(self, table: Any) -> None:
        """Append rows; they are on disk afterwards, though not durable."""
        if self._full:
            self._turn()
        self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._full = 0 < self._limit <= self._file.tell()
        crashpoint("stage.written")

    def close(self, figures: Mapping[str, object]) -> None:
        """Write the last footer, with these facts besides."""
        if self._count:
            figures = {**figures, "part": self._count, "parts": self._count + 1}
        self._end(figures)
        crashpoint("stage.finished")

    def discard(self) -> None:
        """Remove what there is; at any time, and as often as one likes."""
        if self.open:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._writer.close()
            self._writer.is_open = False  # else its finalizer would write to the closed file
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            durable.remove(self.path)

    def _end(self, facts: Mapping[str, object]) -> None:
        words = {f"casparian.{fact}": str(value) for fact, value in facts.items()}
        self._writer.add_key_value_metadata(words)
        self._writer.close()
        self._file.close()

    def _turn(self) -> None:
        """Begin another part; the first one moves into a folder then."""
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
        OSError: it is gone, or cannot be looked at.
    """
    return sorted(path.iterdir()) if path.is_dir() else [path]


def size(path: Path) -> int:
    """Bytes of an output's files. Raises OSError as `files`."""
    return sum(file.stat().st_size for file in files(path))


def digest(path: Path) -> str:
    """SHA-256 of an output, hexadecimal: of its file's bytes; of a folder, over the SHA-256
    (32 bytes each) of its files, in the order of their names.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(b"".join(bytes.fromhex(digest(p)) for p in files(path))).hexdigest()


def make_durable(path: Path) -> None:
    """Make the data of an output's files, and their names in its folder, survive a power cut.

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
    """What the files of a finished output say of it.

    Raises:
        ValueError, pa.ArrowException: they are not the files of one output of ours.
        OSError: it is gone, or cannot be read.
    """
    footers = []
    for file in files(path):
        with file.open("rb") as opened:  # by its name Arrow would say less about a fault
            footers.append(pq.read_metadata(opened))
    facts = [facts_of(footer.metadata or {}) for footer in footers]
    if path.is_dir() and (
        [fact.get("part") for fact in facts] != [str(number) for number in range(len(facts))]
        or len({fact.get("output_key") for fact in facts}) != 1
        or facts[-1].get("parts") != str(len(facts))
    ):
        raise ValueError("these are not all the parts of one output")
    return Footer(facts[-1], sum(footer.num_rows for footer in footers))


def rewritten(path: Path, topic: str, columns: Any) -> Path:
    """A copy of a finished output with other columns, durable, beside it; the same facts.

    Args:
        columns: every one of the output's, and perhaps more; with the lineage columns.

    Raises:
        OutputRefused: a value would not be the same in them.
        OSError: the disk refused.
    """
    copy = path.with_name(f"{path.name}.fitted")
    durable.remove(copy)  # of somebody who died on the way; nobody reads it
    if path.is_dir():
        copy.mkdir()
    for file in files(path):
        with file.open("rb") as opened, pq.ParquetFile(opened) as source:
            facts = {k: v for k, v in (source.metadata.metadata or {}).items() if k[:10] == _OURS}
            schema = columns.with_metadata(facts)
            settles = own_topic(topic, facts_of(facts))
            target = copy / file.name if path.is_dir() else copy
            with pq.ParquetWriter(
                target, schema, compression="zstd", compression_level=1
            ) as writer:
                for number in range(source.num_row_groups):
                    table = fit(topic, source.read_row_group(number), schema, settles)
                    writer.write_table(table, row_group_size=GROUP_ROWS)
    make_durable(copy)
    durable.fsync_path(copy.parent)
    return copy


def are_exact(path: Path, name: str, kind: Any) -> bool:
    """Whether a finished output's column of numbers has values of another type only.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
    """
    for file in files(path):
        with file.open("rb") as opened, pq.ParquetFile(opened) as source:
            number = _leaf(source, name)
            for group in range(source.num_row_groups):
                column = source.read_row_group(group, columns=[name]).column(0)
                if number is None or not is_exact(column, kind):
                    return False
    return True


def is_within_double(path: Path, name: str) -> bool:
    """Whether a double holds every value of a finished output's column of whole numbers.

    The files' statistics tell; without them it counts as not.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
    """
    for file in files(path):
        with file.open("rb") as opened, pq.ParquetFile(opened) as source:
            number = _leaf(source, name)
            if number is None:
                continue
            for group in range(source.num_row_groups):
                column = source.metadata.row_group(group).column(number)
                told = column.statistics if column.is_stats_set else None
                if told is None or not told.has_min_max:
                    if told is None or told.null_count != column.num_values:
                        return False
                elif not -EXACT_IN_DOUBLE <= told.min <= told.max <= EXACT_IN_DOUBLE:
                    return False
    return True


def _leaf(source: Any, name: str) -> int | None:
    """The number of a column of whole numbers or floating point among a file's; None where it has
    none of that name."""
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


# A topic's folder in a Parquet sink: its outputs, and `_common_metadata`, the columns of them all.
#
# `_common_metadata` is a Parquet file without rows. Its columns are those of every output of the
# topic, with the lineage columns last, as `topic_schema` unites them; it is written before the
# first file that has them, so that no file is there which it does not cover. Where it is not there
# (an earlier release wrote none, or somebody deleted it) the outputs' own footers give the same.


COLUMNS_FILE = "_common_metadata"
"""The name that Parquet readers know for a file with the columns of the files beside it."""

_OUR_TOPIC = b"casparian.topic"


def has_topic_columns(folder: Path) -> bool:
    """Whether the topic's columns need not be asked of its outputs."""
    return os.path.lexists(folder / COLUMNS_FILE)


def topic_columns(folder: Path) -> Any:
    """A topic's columns so far, as an Arrow schema without the lineage columns.

    Raises:
        SinkConflict: what has the name of our file is not our file.
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
    """Say what the topic's columns are from now on; durable when this returns.

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


def topic_is_within_double(root: Path, topic: str, name: str) -> bool:
    """Whether a double holds each value of a column of whole numbers in all outputs of a topic,
    also in those that are retracted. What cannot be read as Parquet may have any.

    Raises:
        OSError: the disk refused to read one.
    """
    folders = (root / topic, base.hidden_folder(root, topic))
    every = (output for folder in folders for output in base.list_outputs(folder))
    try:
        return all(is_within_double(output, name) for output in every)
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise
        return False


def _columns_of_outputs(folder: Path) -> Any:
    """What the outputs' footers say, the one of the first job first."""
    found = []
    for output in base.list_outputs(folder):
        try:
            told = read_footer(output)
            with files(output)[0].open("rb") as file:
                schema = own_columns(pq.read_schema(file))
            found.append((int(told.facts["job_id"]), output.name, schema))
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            if is_disk_fault(error) and not isinstance(error, FileNotFoundError):
                raise
    united = pa.schema([])
    for _, _, schema in sorted(found, key=lambda each: each[:2]):
        united = widened(united, schema)
    return united


def _foreign(folder: Path) -> SinkConflict:
    return SinkConflict(
        f"{folder / COLUMNS_FILE} is not one of ours; it was left untouched",
        "move it elsewhere, then retry the job: the outputs say what it would have in it",
    )
