"""`plugins/windows_events.py` on real event logs, and on broken ones."""

from __future__ import annotations

import json
import random
import struct
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.conftest import Run

HEADER, CHUNK = 4096, 65536
RECORDS = [108, 102, 116, 118, 127, 130, 136, 157, 140, 153, 129, 128, 136, 148, 53]
"""Of each chunk of `system.evtx`, whose last two chunks are zeros."""


def sample(folder: Path, name: str) -> Path:
    (found,) = folder.rglob(name)
    return found


def chunk_at(index: int) -> int:
    return HEADER + index * CHUNK


class Read:
    """What the plugin makes of bytes: the numbers of rows, and the rejects."""

    def __init__(self, run: Run, folder: Path, data: bytes) -> None:
        file = folder / "log.evtx"
        file.write_bytes(data)
        out = run(file)
        rows = out["windows_events"].to_pylist() if "windows_events" in out else []
        self.rows = [row["record_id"] for row in rows]
        self.rejects: list[dict[str, Any]] = (
            out["windows_event_rejects"].to_pylist() if "windows_event_rejects" in out else []
        )
        self.named = sum(reject["records"] or 0 for reject in self.rejects)


@pytest.fixture
def log(shared_files: Path) -> bytes:
    """A log of 1,881 records that was copied while Windows wrote to it."""
    return sample(shared_files, "system.evtx").read_bytes()


def closed(data: bytes) -> bytes:
    """The log as if it had been closed before it was copied."""
    header = bytearray(data[:HEADER])
    struct.pack_into("<QQQ", header, 8, 0, len(RECORDS) - 1, sum(RECORDS) + 1)
    struct.pack_into("<H", header, 42, len(RECORDS))
    struct.pack_into("<II", header, 120, 0, zlib.crc32(header[:120]))
    return bytes(header) + data[HEADER:]


def test_a_record_is_a_row(windows_events: Run, shared_files: Path) -> None:
    out = windows_events(sample(shared_files, "new-user-security.evtx"))
    assert out.keys() == {"windows_events"}
    rows = out["windows_events"].to_pylist()
    assert [row["event_id"] for row in rows] == [4728, 4720, 4732, 4732]
    assert rows[1]["timestamp"] == datetime(2013, 10, 23, 16, 22, 39, 989125, UTC)
    assert rows[1]["provider"] == "Microsoft-Windows-Security-Auditing"
    assert rows[1]["channel"] == "Security"
    assert rows[1]["computer"] == "IE8Win7"
    assert rows[1]["level"] == 0
    assert json.loads(rows[1]["event_data"])["EventData"]["TargetUserName"] == "IEUser"
    assert json.loads(rows[1]["system"])["EventRecordID"] == 112


def test_every_record_of_a_large_log(windows_events: Run, tmp_path: Path, log: bytes) -> None:
    for data in (log, closed(log)):
        read = Read(windows_events, tmp_path, data)
        assert read.rows == list(range(1, 1882))
        assert read.rejects == []


@pytest.mark.parametrize("at", [600_000, 928_000])
def test_a_log_that_is_cut_in_a_chunk(
    at: int, windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    index = (at - HEADER) // CHUNK
    until = sum(RECORDS[: index + 1])
    read = Read(windows_events, tmp_path, log[:at])
    (reject,) = read.rejects
    assert read.rows == list(range(1, reject["first_record"]))
    assert len(read.rows) > until - RECORDS[index]
    assert (reject["chunk"], reject["offset"]) == (index, chunk_at(index))
    assert reject["last_record"] == until
    assert len(read.rows) + reject["records"] == until


def test_what_is_missing_at_the_end_of_a_closed_log_is_known(
    windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    for at in (chunk_at(12), chunk_at(12) + 100, chunk_at(12) + 40_000, HEADER, 200):
        read = Read(windows_events, tmp_path, closed(log)[:at])
        assert len(read.rows) + read.named == 1881
        assert {reject["last_record"] for reject in read.rejects} >= {1881}


@pytest.mark.parametrize("indexes", [[3], [0], [13], [3, 4], [0, 1], [2, 9]])
def test_chunks_of_zeros(
    indexes: list[int], windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    data = bytearray(log)
    gone: set[int] = set()
    for index in indexes:
        data[chunk_at(index) : chunk_at(index + 1)] = bytes(CHUNK)
        first = sum(RECORDS[:index]) + 1
        gone |= set(range(first, first + RECORDS[index]))
    read = Read(windows_events, tmp_path, bytes(data))
    assert read.rows == sorted(set(range(1, 1882)) - gone)
    named: set[int] = set()
    for reject in read.rejects:
        named |= set(range(reject["first_record"], reject["last_record"] + 1))
        assert reject["chunk"] in indexes
    assert named == gone
    assert read.named == len(gone)


def test_the_last_chunk_of_a_closed_log_is_missed(
    windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    data = closed(log)[: chunk_at(14)] + bytes(CHUNK * 3)
    read = Read(windows_events, tmp_path, data)
    (reject,) = read.rejects
    assert (reject["first_record"], reject["last_record"]) == (1829, 1881)


@pytest.mark.parametrize("damage", ["zeros", "flip", "magic"])
def test_the_records_of_a_chunk_without_a_header_are_read(
    damage: str,
    windows_events: Run,
    tmp_path: Path,
    log: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, at = bytearray(log), chunk_at(3)
    if damage == "zeros":
        data[at : at + 512] = bytes(512)
    else:
        data[at + (16 if damage == "flip" else 2)] ^= 1
    read = Read(windows_events, tmp_path, bytes(data))
    assert read.rows == list(range(1, 1882))
    assert read.rejects == []
    assert "the header of chunk 3 at byte 200704 does not match" in capsys.readouterr().out


def test_a_header_of_the_log_that_is_damaged(
    windows_events: Run, tmp_path: Path, log: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in (bytes(HEADER) + log[HEADER:], log[:40] + b"\xff" + log[41:]):
        assert len(Read(windows_events, tmp_path, data).rows) == 1881
        assert "the header of the log is damaged" in capsys.readouterr().out


def test_values_under_a_wrong_checksum_are_said(
    windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    at = log.index("Service".encode("utf-16-le"), chunk_at(5))
    read = Read(windows_events, tmp_path, log[:at] + b"s" + log[at + 1 :])
    assert len(read.rows) == 1881
    (reject,) = read.rejects
    assert (reject["chunk"], reject["records"]) == ((at - HEADER) // CHUNK, 0)
    assert "checksum" in reject["reason"]


def test_a_record_without_a_head_does_not_hide_those_behind_it(
    windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    at = log.index(b"**\0\0", chunk_at(3) + 20_000)
    (number,) = struct.unpack_from("<Q", log, at + 8)
    read = Read(windows_events, tmp_path, log[:at] + b"\xff" * 24 + log[at + 24 :])
    assert sorted({*range(1, 1882)} - {*read.rows}) == [number]
    assert [reject["first_record"] for reject in read.rejects if reject["records"]] == [number]


def test_a_full_log_goes_on_at_its_beginning(
    windows_events: Run, tmp_path: Path, log: bytes
) -> None:
    """The oldest chunk is the fourth in the file; another one between them is lost."""
    body = log[HEADER : chunk_at(15)]
    turned = body[CHUNK * 12 :] + body[: CHUNK * 12]
    header = bytearray(closed(log)[:HEADER])
    struct.pack_into("<QQ", header, 8, 3, 2)
    struct.pack_into("<I", header, 124, zlib.crc32(header[:120]))
    data = bytes(header) + turned
    assert Read(windows_events, tmp_path, data).rejects == []
    assert Read(windows_events, tmp_path, log[:HEADER] + turned).rejects == []
    zeros = data[: chunk_at(6)] + bytes(CHUNK) + data[chunk_at(7) :]
    (reject,) = Read(windows_events, tmp_path, zeros).rejects
    assert (reject["first_record"], reject["last_record"]) == (327, 444)


def test_gaps_between_whole_chunks_are_told(
    windows_events: Run, tmp_path: Path, log: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    data = log[: chunk_at(3)] + log[chunk_at(4) :]
    assert Read(windows_events, tmp_path, data).rejects == []
    assert "no records 327 to 444" in capsys.readouterr().out


@pytest.mark.slow
def test_random_damage(windows_events: Run, tmp_path: Path, log: bytes, seed: int) -> None:
    """Rows and the records that rejects name are as many as the log had."""
    rng = random.Random(seed)
    whole = closed(log)[: chunk_at(15)]
    for round_ in range(25):
        data = bytearray(whole)
        what = rng.choice(["cut", "zeros", "bytes", "sector"])
        if what == "cut":
            del data[rng.randrange(HEADER, len(data)) :]
        elif what == "zeros":
            for index in rng.sample(range(15), rng.randint(1, 3)):
                data[chunk_at(index) : chunk_at(index + 1)] = bytes(CHUNK)
        else:
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(HEADER, len(data) - 512)
                size = 512 if what == "sector" else rng.randint(1, 8)
                data[at : at + size] = rng.choice([bytes(size), rng.randbytes(size)])
        read = Read(windows_events, tmp_path, bytes(data))
        assert len(set(read.rows)) == len(read.rows), (seed, round_)
        assert len(read.rows) + read.named == 1881, (seed, round_, what)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"plain text", "not a Windows event log"),
        (b"<html><body>", "HTML"),
        (b"ElfFile\0" + bytes(50), "ends within its header"),
    ],
)
def test_what_is_no_event_log_fails(
    data: bytes, what: str, windows_events: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=what):
        Read(windows_events, tmp_path, data)


def test_an_empty_file_publishes_nothing(windows_events: Run, tmp_path: Path) -> None:
    read = Read(windows_events, tmp_path, b"")
    assert read.rows == read.rejects == []
