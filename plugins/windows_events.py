# /// script
# requires-python = ">=3.11"
# dependencies = ["evtx>=0.14", "pyarrow>=23.0.1"]
# ///
"""Windows event logs (EVTX) become rows of topic `windows_events`: one an event record.

`record_id` and `timestamp` (UTC, microseconds) are those of the record's header; `event_id`,
`level`, `provider`, `channel` and `computer` are those of its System element, null where it has
none. `event_data` is the EventData, UserData or whatever else the event holds besides System, as
JSON text; `system` is the whole System element as JSON text, so that nothing is left out.

A record that cannot be parsed goes to topic `windows_event_rejects`: its position among the
records that were met (from 1) and the reason, which names the record or chunk. A file that is
not an event log at all fails the job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import Any

import pyarrow as pa
from evtx import PyEvtxParser

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.evtx",
    topic=["windows_events", "windows_event_rejects"],
    version="1.0.0",
)

BATCH_ROWS = 2000
EVENTS = pa.schema(
    [
        ("record_id", pa.int64()),
        ("timestamp", pa.timestamp("us", "UTC")),
        ("event_id", pa.int64()),
        ("level", pa.int64()),
        ("provider", pa.string()),
        ("channel", pa.string()),
        ("computer", pa.string()),
        ("event_data", pa.string()),
        ("system", pa.string()),
    ]
)
REJECTS = pa.schema([("position", pa.int64()), ("reason", pa.string())])


class Handler(BasePlugin):
    """Publishes the records of one event log."""

    def execute(self, file_path: str) -> None:
        records = read_records(file_path)
        while batch := list(islice(records, BATCH_ROWS)):
            self.publish_rows("windows_events", EVENTS, [r for r in batch if "reason" not in r])
            self.publish_rows("windows_event_rejects", REJECTS, [r for r in batch if "reason" in r])

    def publish_rows(self, topic: str, schema: Any, rows: list[dict[str, Any]]) -> None:
        if rows:
            self.publish(topic, pa.Table.from_pylist(rows, schema=schema))


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """Rows of either topic, in the order of the file.

    Raises:
        ValueError: the file is not an event log.
    """
    try:
        records = PyEvtxParser(path, number_of_threads=1).records_json()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"not a Windows event log: {error}") from error
    position = 0
    while True:
        position += 1
        try:
            record = next(records)
            yield row_of(record)
        except StopIteration:
            return
        except (RuntimeError, OSError, ValueError) as error:
            yield {"position": position, "reason": str(error)}


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """One row of `windows_events`.

    Raises:
        ValueError: a value is not what an event has in its place.
    """
    event = json.loads(record["data"])["Event"]
    system = event.get("System") or {}
    rest = {name: event[name] for name in event if name not in ("#attributes", "System")}
    return {
        "record_id": record["event_record_id"],
        "timestamp": datetime.fromisoformat(record["timestamp"].removesuffix(" UTC")),
        "event_id": number(system.get("EventID")),
        "level": number(system.get("Level")),
        "provider": ((system.get("Provider") or {}).get("#attributes") or {}).get("Name"),
        "channel": system.get("Channel"),
        "computer": system.get("Computer"),
        "event_data": json.dumps(rest, ensure_ascii=False),
        "system": json.dumps(system, ensure_ascii=False),
    }


def number(value: Any) -> int | None:
    """An element that is a number, a text, or a text with attributes."""
    text = value.get("#text") if isinstance(value, dict) else value
    return None if text is None else int(text)
