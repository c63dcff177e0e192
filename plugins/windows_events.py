# /// script
# requires-python = ">=3.11"
# dependencies = ["evtx>=0.14", "pyarrow>=23.0.1"]
# ///
"""Windows event logs (EVTX) become rows of topic `windows_events`, one for each event record.

`record_id` and `timestamp` (UTC, microseconds) are from the record's header; `event_id`, `level`,
`provider`, `channel` and `computer` from its System element, null if it lacks them. `event_data` is
the EventData, UserData or any other content of the event, as JSON text; `system` is the whole
System element as JSON text, so that nothing is lost.

A log consists of chunks of 64 KiB, and the records in them are numbered. All readable records
become rows, also those of chunks that are cut or damaged. Records that cannot be read, or are
missing although other chunks or the log's header count them, go to topic `windows_event_rejects`:
the chunk (from 0), its offset in the file, the first and the last record, their number (null if it
cannot be known), and the reason. A reject of 0 records means that the rows of a chunk may be wrong,
because its checksum is. Chunks of zeros at the end are space that Windows reserves. Record numbers
missing between intact chunks are only logged, because logs that were exported or cleared lack some.
A file that is not an event log fails the job; an empty file publishes nothing.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from typing import IO, Any, NamedTuple

import pyarrow as pa
from evtx import PyEvtxParser

from casparian_flow.sdk import BasePlugin, PluginMetadata, foreign_kind, printable

MANIFEST = PluginMetadata(
    pattern="*.evtx",
    topic=["windows_events", "windows_event_rejects"],
    version="1.1.0",
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
REJECTS = pa.schema(
    [
        ("chunk", pa.int64()),
        ("offset", pa.int64()),
        ("first_record", pa.int64()),
        ("last_record", pa.int64()),
        ("records", pa.int64()),
        ("reason", pa.string()),
    ]
)

HEADER, CHUNK, FIRST = 4096, 65536, 512  # bytes: log's header, a chunk, a chunk's header
LOG_HEADER = 128  # bytes of the log's header that are used
SMALLEST = 28  # bytes of a record without an event
GAP = (1 << 64) - 1  # number of a record that fills bytes between records
MOST = (CHUNK - FIRST) // SMALLEST  # the most records of a chunk

Row = dict[str, Any]


class LogHeader(NamedTuple):
    """The header of the log."""

    first_chunk: int
    chunks: int
    next_record: int
    current: bool
    """Whether it is intact, and the log was closed when it was copied."""


class Chunk:
    """64 KiB of the log, or less if the file ends in it."""

    def __init__(self, index: int, data: bytes) -> None:
        self.index = index
        self.data = data
        self.size = len(data)
        self.offset = HEADER + index * CHUNK
        self.magic = data.startswith(b"ElfChnk\0") and self.size >= FIRST
        self.whole = self.magic and zlib.crc32(data[:120] + data[128:FIRST]) == number_at(data, 124)
        """Whether its header is intact."""
        self.empty = not data.strip(b"\0")
        self.free = number_at(data, 48) if self.whole else CHUNK
        self.first = self.last = self.shift = self.first_id = self.last_id = 0
        """`first` and `last`: numbers of its first and last record, counted from 1 in the log;
        `first_id` and `last_id`: their `record_id`; `shift`: the difference of the two."""
        self.dense = False
        """Whether the shift is the same for all records; it differs in logs exported in part."""
        if self.whole and FIRST < self.free <= CHUNK:
            first, last, self.first_id, self.last_id = struct.unpack_from("<QQQQ", data, 8)
            if 0 < first <= last < GAP >> 1 > self.last_id and last - first < MOST:
                self.first, self.last, self.shift = first, last, self.first_id - first
                self.dense = self.last_id - last == self.shift
        self.found: list[tuple[int, int, int]] = []
        """Offset, size and `record_id` of the records found in it."""

    @property
    def numbered(self) -> bool:
        """Whether its header has the numbers of its records."""
        return self.whole and self.last > 0

    @property
    def name(self) -> str:
        return f"chunk {self.index} at byte {self.offset}"

    @property
    def state(self) -> str:
        if self.size < CHUNK:
            end = f"the file ends at byte {self.offset + self.size}, within {self.name}"
            return end if self.size else f"{self.name} is not in the file"
        return f"{self.name} {'is zeros' if self.empty else 'is damaged'}"

    def reject(self, first: int | None, last: int | None, count: int | None, reason: str) -> Row:
        return {
            "chunk": self.index,
            "offset": self.offset,
            "first_record": first,
            "last_record": last,
            "records": count,
            "reason": reason,
        }


def number_at(data: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(data[at : at + size], "little")


class Handler(BasePlugin):
    """Publishes the records of one event log."""

    def execute(self, file_path: str) -> None:
        with open(file_path, "rb") as file:
            records = read_records(file)
            while batch := list(islice(records, BATCH_ROWS)):
                events, rejects = MANIFEST.topic
                self.publish_rows(events, EVENTS, [r for r in batch if "reason" not in r])
                self.publish_rows(rejects, REJECTS, [r for r in batch if "reason" in r])

    def publish_rows(self, topic: str, schema: Any, rows: list[Row]) -> None:
        if rows:
            self.publish(topic, pa.Table.from_pylist(rows, schema=schema))


def read_records(file: IO[bytes]) -> Iterator[Row]:
    """Rows of either topic, in the order of the file.

    Raises:
        ValueError: the file is not an event log.
    """
    start = file.read(HEADER)
    file.seek(HEADER)
    if not start:
        return
    chunk = Chunk(0, file.read(CHUNK))
    if not start.startswith(b"ElfFile\0") and not chunk.magic:
        kind = foreign_kind(start)
        raise ValueError(f"not a Windows event log{kind and f': this is {kind}'}")
    if len(start) < LOG_HEADER:
        raise ValueError(f"the event log ends within its header, at byte {len(start)}")
    header = read_header(start)
    chunks: list[Chunk] = []
    free: list[Chunk] = []
    while chunk.data or chunk.index < header.chunks:
        if chunk.empty and chunk.index >= header.chunks:
            free.append(chunk)
        else:
            for ready in (*free, chunk):  # zeros before another chunk are not reserved space
                find_records(ready)
                yield from read_chunk(ready)
                ready.data = b""  # its bytes are no longer needed
                chunks.append(ready)
            free = []
        chunk = Chunk(chunk.index + 1, file.read(CHUNK))
    yield from missing_records(header, chunks)
    if free and not header.current:
        print(
            f"chunks {free[0].index} to {free[-1].index} are zeros; whether they ever held records "
            "is not known, since the log was not closed when it was copied"
        )


def read_header(data: bytes) -> LogHeader:
    """Read the log's header; a damaged one counts as empty."""
    if not data.startswith(b"ElfFile\0") or zlib.crc32(data[:120]) != number_at(data, 124):
        print("the header of the log is damaged: the number of its records is not known")
        return LogHeader(0, 0, 0, False)
    chunks, dirty = number_at(data, 42, 2), number_at(data, 120) & 1
    if dirty:
        print("the log was not closed when it was copied: its header may be older than its chunks")
    return LogHeader(number_at(data, 8, 8), chunks, number_at(data, 24, 8), not dirty)


def find_records(chunk: Chunk) -> None:
    """Find the records of a chunk by their structure, also after damaged bytes."""
    data, at, last = chunk.data, FIRST, -1
    if not chunk.magic and chunk.empty:
        return
    while at < len(data):
        size, number = number_at(data, at + 4), number_at(data, at + 8, 8)
        fits = SMALLEST <= size <= len(data) - at and number_at(data, at + size - 4) == size
        # Records in the free part of a chunk are old, unless they continue its last record.
        if at >= chunk.free:
            follows = number == last + 1
        elif chunk.numbered:
            follows = max(last + 1, chunk.first_id) <= number <= chunk.last_id
        else:
            follows = last < number <= (last + MOST if last >= 0 else GAP >> 1)
        if fits and follows and data.startswith(b"**\0\0", at):
            chunk.found.append((at, size, number))
            at, last = at + size, number
        elif at < chunk.free:
            at = data.find(b"**\0\0", at + 1)
            if at < 0 or at >= chunk.free:
                return
        else:
            return


def read_chunk(chunk: Chunk) -> Iterator[Row]:
    """The records found in a chunk, each as a row or a reject."""
    if not chunk.found:
        return
    left = {number for _, _, number in chunk.found}
    why: dict[int, str] = {}
    records = PyEvtxParser(io.BytesIO(repaired(chunk)), 1).records_json()
    while True:
        number = -1
        try:
            record = next(records)
            number = record["event_record_id"]
            if number in left:
                row = row_of(record)
                left.remove(number)
                yield row
        except StopIteration:
            break
        except (RuntimeError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            named = re.search(r"record number (\d+):", str(error))
            why[int(named[1]) if named else number] = printable(str(error))
    read = len(chunk.found) - len(left)
    for number in sorted(left):
        reason = why.get(number) or why.get(-1) or "the event in it cannot be read"
        yield chunk.reject(number, number, 1, f"record {number} of {chunk.name}: {reason}")
    if chunk.whole and len(chunk.data) == CHUNK:
        if zlib.crc32(chunk.data[FIRST : chunk.free]) != number_at(chunk.data, 52):
            yield chunk.reject(
                chunk.found[0][2],
                chunk.found[-1][2],
                0,
                f"the records of {chunk.name} do not match its checksum: its {read} rows may "
                "hold wrong values",
            )
    elif not chunk.whole:
        print(
            f"the header of {chunk.name} does not match its checksum, so its {read} rows may "
            "be wrong"
        )


def repaired(chunk: Chunk) -> bytes:
    """A log of one chunk, in which filler records replace the bytes between its records."""
    data = bytearray(chunk.data.ljust(CHUNK, b"\0"))
    at = FIRST
    for place, size, _ in chunk.found:
        if place - at >= SMALLEST:
            struct.pack_into("<IIQQ", data, at, 0x2A2A, place - at, GAP, 0)
            data[at + 24 : place - 4] = bytes(place - at - SMALLEST)
            struct.pack_into("<I", data, place - 4, place - at)
        at = place + size
    last = chunk.found[-1][2]
    if not chunk.whole:
        data[:FIRST] = bytes(FIRST)
    struct.pack_into("<8sQQQQIIII", data, 0, b"ElfChnk", 1, last, 1, last, 128, 0, at, 0)
    log = struct.pack("<8sQQQIHHHH", b"ElfFile", 0, 0, last + 1, 128, 1, 3, HEADER, 1)
    return log.ljust(HEADER, b"\0") + data


def missing_records(header: LogHeader, chunks: list[Chunk]) -> Iterator[Row]:
    """Rejects for records that are missing according to the chunks and the log's header."""
    for chunk in chunks:
        if chunk.numbered:
            yield from missing(chunk.state, [chunk], chunk.first, chunk.last, [chunk])
    before: Chunk | None = None
    unread: list[Chunk] = []
    for chunk in in_order(header, chunks):
        if not chunk.numbered:
            if not chunk.whole or chunk.found:
                unread.append(chunk)
            continue
        first = before.last + 1 if before else 1
        if unread:
            known = before is not None or chunk.first <= len(unread) * MOST
            sides = [before, chunk] if before else [chunk]
            yield from lost(unread, first if known else None, chunk.first - 1, sides)
        elif before and first < chunk.first:
            print(
                f"the log has no records {first} to {chunk.first - 1}, between {before.name} and "
                f"{chunk.name}, which are whole: it may have been exported in part"
            )
        before, unread = chunk, []
    first = before.last + 1 if before else 1
    last = header.next_record - 1 if header.current else None
    if last is not None and last - first >= len(unread) * MOST:
        last = None
    if unread:
        yield from lost(unread, first, last, [before] if before else [])
    if chunks and chunks[-1].size < CHUNK and not header.current:
        end = chunks[-1].offset + chunks[-1].size
        print(f"the file ends at byte {end}, within a chunk: whether more followed is not known")


def in_order(header: LogHeader, chunks: list[Chunk]) -> list[Chunk]:
    """The chunks from the oldest on: a full log continues at its beginning."""
    numbered = [chunk for chunk in chunks if chunk.numbered]
    start = header.first_chunk if header.current and header.first_chunk < len(chunks) else 0
    if not header.current and numbered:
        oldest = min(numbered, key=lambda chunk: chunk.first)
        start = oldest.index if oldest is not numbered[0] else 0
    return chunks[start:] + chunks[:start]


def lost(
    unread: list[Chunk], first: int | None, last: int | None, sides: list[Chunk]
) -> Iterator[Row]:
    """Rejects for chunks without a usable header, between chunks (`sides`) that have one."""
    what = "; ".join(chunk.state for chunk in unread[:3])
    if first is None or last is None:
        here = sum(len(chunk.found) for chunk in unread)
        some = "1 record was" if here == 1 else f"{here} records were"
        reason = f"{what}: {some} found; how many are missing is not known"
        yield unread[0].reject(None, None, None, reason)
    else:
        yield from missing(what, unread, first, last, sides)


def missing(
    what: str, chunks: list[Chunk], first: int, last: int, sides: list[Chunk]
) -> Iterator[Row]:
    """Rejects for the records of a range of numbers that were not found in the chunks."""
    found = {number for chunk in chunks for _, _, number in chunk.found}
    shifts = {chunk.shift for chunk in sides}
    if len(shifts) > 1 or not all(chunk.dense for chunk in sides):
        if (count := last - first + 1 - len(found)) > 0:
            some = "1 record is" if count == 1 else f"{count} records are"
            yield chunks[0].reject(None, None, count, f"{what}: {some} missing")
        return
    shift = shifts.pop() if shifts else 0
    gone = [n for n in range(first + shift, last + shift + 1) if n not in found]
    at = 0
    while at < len(gone):
        end = at
        while end + 1 < len(gone) and gone[end + 1] == gone[end] + 1:
            end += 1
        some = f"records {gone[at]} to {gone[end]} are" if end > at else f"record {gone[at]} is"
        reason = f"{what}: {some} missing"
        yield chunks[0].reject(gone[at], gone[end], end - at + 1, reason)
        at = end + 1


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """One row of `windows_events`.

    Raises:
        ValueError: a value of the event is invalid.
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
    """The number in an element that is a number, a text, or a text with attributes."""
    text = value.get("#text") if isinstance(value, dict) else value
    return None if text is None else int(text)
