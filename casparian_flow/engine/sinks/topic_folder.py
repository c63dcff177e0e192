"""A topic's folder in a Parquet sink: its outputs, and `_common_metadata`, the columns of them all.

`_common_metadata` is a Parquet file without rows. Its columns are those of every output of the
topic, with the lineage columns last, as `topic_schema` unites them; it is written before the first
file that has them, so that no file is there which it does not cover. Where it is not there (an
earlier release wrote none, or somebody deleted it) the outputs' own footers give the same.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import listing, parts
from casparian_flow.engine.sinks.base import is_disk_fault
from casparian_flow.engine.sinks.topic_schema import LINEAGE_FIELDS, own_columns, widened
from casparian_flow.errors import SinkConflict

COLUMNS_FILE = "_common_metadata"
"""The name that Parquet readers know for a file with the columns of the files beside it."""

_OURS = b"casparian.topic"


def has_columns_file(folder: Path) -> bool:
    """Whether the topic's columns need not be asked of its outputs."""
    return os.path.lexists(folder / COLUMNS_FILE)


def columns(folder: Path) -> Any:
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
    if _OURS not in (schema.metadata or {}):
        raise _foreign(folder)
    return own_columns(schema)


def set_columns(folder: Path, schema: Any) -> None:
    """Say what the topic's columns are from now on; durable when this returns.

    Args:
        schema: without the lineage columns.

    Raises:
        OSError: the disk refused; nothing was changed.
    """
    whole = pa.schema([*schema, *LINEAGE_FIELDS], {_OURS: folder.name.encode()})
    data = io.BytesIO()
    pq.write_metadata(whole, data)
    atomic.write_once(folder / COLUMNS_FILE, data.getvalue())
    crashpoint("parquet.columns_written")


def is_within_double(root: Path, topic: str, name: str) -> bool:
    """Whether a double holds each value of a column of whole numbers in all outputs of a topic,
    also in those that are retracted. What cannot be read as Parquet may have any.

    Raises:
        OSError: the disk refused to read one.
    """
    folders = (root / topic, listing.hidden_folder(root, topic))
    every = (output for folder in folders for output in listing.outputs(folder))
    try:
        return all(parts.is_within_double(output, name) for output in every)
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise
        return False


def _columns_of_outputs(folder: Path) -> Any:
    """What the outputs' footers say, the one of the first job first."""
    found = []
    for output in listing.outputs(folder):
        try:
            told = parts.told(output)
            with parts.files(output)[0].open("rb") as file:
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
