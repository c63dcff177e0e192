"""`plugins/access_log.py`: lines of web servers and of syslog daemons."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.conftest import Run

ACCESS = {
    '127.0.0.1 - frank [10/Oct/2000:13:55:36 -0700] "GET /a.gif HTTP/1.0" 200 2326': {
        "client": "127.0.0.1",
        "user": "frank",
        "time": datetime(2000, 10, 10, 20, 55, 36, tzinfo=UTC),
        "method": "GET",
        "target": "/a.gif",
        "protocol": "HTTP/1.0",
        "status": 200,
        "bytes": 2326,
        "referer": None,
    },
    r'::1 - - [01/Jan/2025:00:00:00 +0000] "GET /?q=\"x\" HTTP/1.1" 304 - "-" "a \"b\"" 9 "z"': {
        "client": "::1",
        "target": r"/?q=\"x\"",
        "bytes": None,
        "referer": None,
        "user_agent": r"a \"b\"",
        "extra": '9 "z"',
    },
    r'shop.example:443 192.0.2.1 - Jo Doe [01/Jan/2025:00:00:00 +0000] "\x16\x03" 400 0 "-" "-"': {
        "virtual_host": "shop.example:443",
        "client": "192.0.2.1",
        "user": "Jo Doe",
        "request": r"\x16\x03",
        "method": None,
        "status": 400,
    },
}  # fmt: skip

SYSLOG = {
    "<34>Oct  1 22:14:15 mymachine su[42]: 'su root' failed on /dev/pts/8": {
        "facility": 4,
        "severity": 2,
        "time": None,
        "time_text": "Oct  1 22:14:15",
        "host": "mymachine",
        "program": "su",
        "pid": "42",
        "message": "'su root' failed on /dev/pts/8",
    },
    "Oct 11 22:14:15 host last message repeated 2 times": {
        "facility": None,
        "program": None,
        "message": "last message repeated 2 times",
    },
    "2025-02-03T10:00:00.123456+01:00 host systemd[1]: Started x: y": {
        "time": datetime(2025, 2, 3, 9, 0, 0, 123456, tzinfo=UTC),
        "program": "systemd",
        "message": "Started x: y",
    },
    r'<165>1 2003-10-11T22:14:15.003Z host evntslog - ID47 [a@1 b="c \"]\" d"][e@1] An event': {
        "facility": 20,
        "severity": 5,
        "time": datetime(2003, 10, 11, 22, 14, 15, 3000, tzinfo=UTC),
        "program": "evntslog",
        "pid": None,
        "message_id": "ID47",
        "structured_data": r'[a@1 b="c \"]\" d"][e@1]',
        "message": "An event",
    },
    "<14>1 - - - - - -": {"time": None, "host": None, "structured_data": None, "message": None},
}  # fmt: skip

CASES = [("access_log", *case) for case in ACCESS.items()]
CASES += [("syslog", *case) for case in SYSLOG.items()]


@pytest.mark.parametrize(("topic", "line", "expected"), CASES)
def test_lines(
    topic: str, line: str, expected: dict[str, Any], access_log: Run, tmp_path: Path
) -> None:
    file = tmp_path / "access.log"
    file.write_text(line + "\n")
    out = access_log(file)
    assert out.keys() == {topic}
    (row,) = out[topic].to_pylist()
    assert {name: row[name] for name in expected} == expected


def test_no_line_is_lost(access_log: Run, tmp_path: Path) -> None:
    good_access, good_syslog = next(iter(ACCESS)), next(iter(SYSLOG))
    lines = [
        good_access, "", good_syslog, "no log line", good_access.replace("10/Oct", "32/Oct"),
        good_access[:40], good_access.replace("a.gif", "\udcff"),
    ] * 2000  # fmt: skip
    file = tmp_path / "access.log.1.gz"
    file.write_bytes(gzip.compress("\r\n".join(lines).encode("utf-8", "surrogateescape")))
    out = access_log(file)
    assert {topic: table.num_rows for topic, table in out.items()} == {
        "access_log": 4000,
        "syslog": 2000,
        "access_log_rejects": 6000,
    }
    assert [tuple(row.values()) for row in out["access_log_rejects"].slice(0, 3).to_pylist()] == [
        (4, "neither an access log line nor a syslog line", "no log line"),
        (
            5,
            "time data '32/Oct/2000:13:55:36 -0700' does not match format '%d/%b/%Y:%H:%M:%S %z'",
            lines[4],
        ),
        (6, "neither an access log line nor a syslog line", lines[5]),
    ]
    assert out["access_log"].column("target")[1].as_py() == "/\\xff"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="the gzip file is damaged"):
        access_log(file)
