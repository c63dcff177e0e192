"""Staging: an attempt's output is written to Parquet in the sink's stage folder.

All sinks use it. The file has the plugin's columns, then the lineage columns; its footer names the
output (`casparian.output_key` and others) and counts its rows. Row groups have 128k rows, whatever
the size of the batches, and zstd level 1, which measured as fast as no compression, at a fifth of
the size. A large output is a folder of several files (`parts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow.contract import LINE
from casparian_flow.crashpoints import crashpoint
from casparian_flow.durable import fsync_path, make_folder
from casparian_flow.engine.sinks import parts, topic_schema
from casparian_flow.engine.sinks.base import (
    facts_in,
    is_disk_fault,
    lineage_of,
    lost,
    own_topic,
    unavailable,
)
from casparian_flow.engine.sinks.columns import leaves, pieces, values_of
from casparian_flow.engine.sinks.topic_schema import LINEAGE_FIELDS, fit
from casparian_flow.engine.sizes import VALUE_BYTES
from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import MODES, Output

GROUP_BYTES = 64 << 20
"""Arrow data held in memory before it is written, if rows are too wide for a full row group."""


def seal(stages: Sequence[Stage]) -> list[Output]:
    """Finish staged outputs and make them durable: each file, then each folder once.

    Raises:
        OutputRefused: rows still in memory cannot be stored (not after `Stage.finish`).
        SinkUnavailable: the disk refused. A failed fsync is never repeated, because the kernel may
            have dropped the data: discard the stages, and run the attempts again.
    """
    sealed = [stage.seal() for stage in stages]
    for folder in {stage.path.parent for stage in stages}:
        try:
            fsync_path(folder)
        except OSError as error:
            raise unavailable(error, folder) from error
        crashpoint("stage.sealed")
    return sealed


class Stage:
    """One output while a Worker writes it.

    A stage without a batch has a file with the lineage columns and no row.

    Args:
        folder: the sink's stage folder; created if absent.
        plan: the output, as it was claimed.
        attempt: the attempt's unique name.
        admit: called with the first batch's schema; raises OutputRefused if the sink cannot hold
            its columns, so that the job fails before it is decided.
        check: called with each batch; raises OutputRefused if the sink cannot hold a value.
        unite: called with the first schema; returns the columns to write, for sinks whose files
            must agree.
        split_bytes: size of a part, for sinks that take a folder of parts; 0: one file.
        known: returns the names of the topic's columns so far, as the sink has them.

    Raises:
        OutputRefused: no sink has such a topic name or mode.
        SinkUnavailable: the folder cannot be created or written.
    """

    def __init__(
        self,
        folder: Path,
        plan: Output,
        attempt: str,
        admit: Callable[[Any], object] = lambda schema: None,
        check: Callable[[Any], object] = lambda batch: None,
        unite: Callable[[Any], Any] = lambda schema: schema,
        split_bytes: int = 0,
        known: Callable[[], Collection[str]] = tuple,
    ) -> None:
        _check_plan(plan)
        self._plan = plan
        self._attempt = attempt
        self._admit = admit
        self._check = check
        self._unite = unite
        self._known = known
        self._settles = own_topic(plan)
        self._counted: list[str] = []
        self.note = ""
        """A line about the output for the attempt's log."""
        self._pending: list[Any] = []
        self._pending_rows = self._pending_bytes = self._rows = self._batches = 0
        path = folder / f"{attempt}-{plan.output_key[:32]}.parquet.part"
        try:
            make_folder(folder.parent, mode=0o700)
            make_folder(folder, mode=0o700)
            self._parts = parts.Parts(path, split_bytes)
        except OSError as error:
            raise unavailable(error, folder) from error

    @property
    def path(self) -> Path:
        """Path of the file, or of the folder from the second part on."""
        return self._parts.path

    def write(self, batch: Any) -> None:
        """Append a pyarrow RecordBatch that the caller has validated.

        Raises:
            OutputRefused: the columns cannot be stored, or use a reserved name.
            SinkUnavailable: the disk is full or read-only.
        """
        batch = topic_schema.may_be_null(batch)
        if not self._parts.begun:
            self._start(batch.schema)
        check_dates(self._plan.topic, batch)
        self._check_values(batch)
        self._batches += 1
        for piece in pieces(batch, _size, GROUP_BYTES):
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            self._pending_bytes += _size(piece)
            if self._pending_rows >= parts.GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
                self._flush()

    def finish(self) -> None:
        """Write the rows still in memory and the footer. Call it after the last `write`.

        Raises:
            OutputRefused: the rows cannot be stored.
            SinkUnavailable: the disk is full or read-only.
        """
        if not self._parts.begun:
            self._open(pa.schema([]))
        if self._parts.open:
            self._flush()
            figures = {"rows": self._rows, "batches": self._batches, "attempt": self._attempt}
            with self._storing(pa.Table.from_batches([], self._given)):
                self._parts.close(figures)

    def seal(self) -> Output:
        """Make the data durable. The module's `seal` also makes the file's name durable.

        Raises:
            OutputRefused, SinkUnavailable: as `finish`.
        """
        self.finish()
        try:
            size, digest = parts.size(self.path), parts.digest(self.path)
            parts.make_durable(self.path)
        except OSError as error:
            raise unavailable(error, self.path) from error
        return msgspec.structs.replace(
            self._plan, stage=str(self.path), rows=self._rows, size_bytes=size, digest=digest
        )

    def discard(self) -> None:
        """Remove the staged files. May be called at any time, and more than once."""
        topic_schema.forget_family(self._plan.location, self._plan.topic, self._counted)
        self._counted = []
        self._parts.discard()

    def _start(self, given: Any) -> None:
        _check_names(self._plan.topic, given)
        self._admit(given)
        self._open(given)
        self._counted = given.names
        self.note = topic_schema.note_family(
            self._plan.location, self._plan.topic, given.names, self._known, self._settles
        )

    def _check_values(self, batch: Any) -> None:
        try:
            self._check(batch)
        except OutputRefused as error:
            message = f"topic {self._plan.topic!r}: {error.message}"
            raise OutputRefused(message, error.hint) from error

    def _open(self, given: Any) -> None:
        # Metadata of the plugin's must not reach the footer, where it could pass for our facts.
        self._given = given.remove_metadata()
        try:
            united = self._unite(self._given)
        except OSError as error:
            raise unavailable(error, self.path) from error
        self._schema = pa.schema(
            [*united, *LINEAGE_FIELDS],
            {f"casparian.{fact}": value for fact, value in facts_in(self._plan).items()},
        )
        with self._storing(pa.Table.from_batches([], united)):
            self._parts.begin(self._schema)

    def _flush(self) -> None:
        if not self._pending_rows:
            return
        given = pa.Table.from_batches(self._pending, self._given)
        values = zip(lineage_of(self._plan), LINEAGE_FIELDS, strict=True)
        for value, field in values:
            constant = pa.repeat(pa.scalar(value, field.type), given.num_rows)
            given = given.append_column(field, constant)
        try:
            table = fit(self._plan.topic, given, self._schema, self._settles)
        except OutputRefused as error:
            if not self._plan.keeps_columns:
                raise
            raise OutputRefused(
                f"{error.message}; the rebuild cannot give the topic other columns, since rows "
                "that it leaves out stay there",
                f"casparian rebuild {self._plan.plugin} --cancel   (then retract or restore what "
                "it leaves out, or send the topic to another sink)",
            ) from error
        with self._storing(table.drop_columns([field.name for field in LINEAGE_FIELDS])):
            self._parts.write(table)
        self._rows += self._pending_rows
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    @contextlib.contextmanager
    def _storing(self, columns: Any) -> Iterator[None]:
        """Turn errors of Arrow and the disk, raised while storing `columns`, into ours."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            if is_disk_fault(error):
                raise unavailable(error, self.path) from error
            raise _refusal(self._plan.topic, columns, error) from error


@contextlib.contextmanager
def reading(output: Output) -> Iterator[Any]:
    """Open the staged Parquet file of an output, for the Committer.

    Raises:
        JobError: the file is gone, damaged, or another one.
        SinkUnavailable: the disk refused to read it.
    """
    try:
        with pq.ParquetFile(output.stage) as staged:
            if staged.metadata.num_rows != output.rows:
                raise lost(output, f"it has {staged.metadata.num_rows} rows, not {output.rows}")
            yield staged
    except FileNotFoundError as error:
        raise lost(output, "it is gone") from error
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise unavailable(error, Path(output.stage)) from error
        raise lost(output, error) from error


def _size(batch: Any) -> int:
    """The bytes of a batch. Nulls take room when written, though not in Arrow."""
    return int(max(batch.nbytes, VALUE_BYTES * values_of(batch)))


def _check_plan(plan: Output) -> None:
    topic = plan.topic
    if not topic.isprintable() or "/" in topic or topic.startswith((".", "_")) or not topic:
        raise OutputRefused(
            f"{topic!r} cannot name a folder or table", "use letters, digits, `_` and `-`"
        )
    if plan.mode not in MODES:
        raise OutputRefused(
            f"topic {topic!r}: there is no mode {plan.mode!r}", f"use one of {', '.join(MODES)}"
        )


def _check_names(topic: str, given: Any) -> None:
    """Refuse names that some sink cannot hold, repeated names and reserved ones.

    `_cf_line` is reserved for what it is in a table with a contract: a line's number.
    """
    seen: set[str] = set()
    for name, kind in zip(given.names, given.types, strict=True):
        is_ours = name.lower().startswith("_cf_") and (name != LINE or kind != pa.int64())
        fault = (
            "is empty" if not name
            else "has a NUL character" if "\0" in name
            else "occurs twice" if name in seen
            else "is reserved: `_cf_` begins the lineage columns" if is_ours
            else ""
        )  # fmt: skip
        if fault:
            raise OutputRefused(
                f"topic {topic!r}: the column name {name!r} {fault}",
                "rename the column in the plugin",
            )
        seen.add(name)
    if not given.names:
        raise OutputRefused(f"topic {topic!r} has no columns", "publish at least one column")


def _refusal(topic: str, columns: Any, error: Exception) -> OutputRefused:
    """The error that names the column Parquet cannot hold: it also fails when written alone."""
    for number, field in enumerate(columns.schema):
        try:
            pq.write_table(columns.select([number]), pa.MockOutputStream())
        except (OSError, pa.ArrowException) as reason:
            return OutputRefused(
                f"topic {topic!r}: column {field.name!r} ({field.type}) cannot be stored: {reason}",
                "convert the column in the plugin",
            )
    return OutputRefused(f"topic {topic!r}: the rows cannot be stored: {error}")


# `date64` counts milliseconds; Parquet stores days in 32 bits, and Arrow casts without a check: a
# date beyond the year 5,881,580 came back as a day of 1970.


def check_dates(topic: str, batch: Any) -> None:
    """Check that Parquet can hold every `date64` of a batch.

    Raises:
        OutputRefused: it cannot hold one; the message names the column.
    """
    types = pa.types
    for field, column in zip(batch.schema, batch.columns, strict=True):
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        is_extension = isinstance(kind, pa.BaseExtensionType)
        if not (types.is_date64(kind) or types.is_nested(kind) or is_extension):
            continue
        for dates in filter(lambda leaf: types.is_date64(leaf.type), leaves(column)):
            try:
                dates.cast(pa.date32())
            except pa.ArrowInvalid as error:
                raise OutputRefused(
                    f"topic {topic!r}: column {field.name!r} ({field.type}) cannot be stored: "
                    f"{error}",
                    "convert the column in the plugin",
                ) from error
