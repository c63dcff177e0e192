"""`plugins/windows_events.py` on real event logs, and on broken ones."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.plugins.conftest import Run


def sample(folder: Path, name: str) -> Path:
    (found,) = folder.rglob(name)
    return found


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


def test_every_record_of_a_large_log(windows_events: Run, shared_files: Path) -> None:
    out = windows_events(sample(shared_files, "system.evtx"))
    assert out["windows_events"].num_rows == 1881
    assert "windows_event_rejects" not in out


def test_a_broken_record_is_a_reject(
    windows_events: Run, shared_files: Path, tmp_path: Path
) -> None:
    whole = sample(shared_files, "system.evtx").read_bytes()
    chunk = 0x1000 + 0x10000  # the second chunk, which starts with its header
    broken = tmp_path / "broken.evtx"
    broken.write_bytes(
        whole[: chunk + 0x2000] + b"\xff" * 0x1000 + whole[chunk + 0x3000 :],
    )
    out = windows_events(broken)
    assert 1600 < out["windows_events"].num_rows < 1881
    assert all(out["windows_event_rejects"].column("reason").to_pylist())


@pytest.mark.parametrize("data", [b"", b"plain text"])
def test_what_is_no_event_log_fails(data: bytes, windows_events: Run, tmp_path: Path) -> None:
    file = tmp_path / "no.evtx"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="not a Windows event log"):
        windows_events(file)
