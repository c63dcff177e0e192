# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1"]
# ///
"""Web server access logs and syslog become rows of topics `access_log` and `syslog`; also gzipped.

Each line is judged by itself. Access log: common and combined format, with an optional virtual
host before them; what a server adds after them is `extra`. Syslog: RFC 5424, RFC 3164, and
rsyslog's and systemd's forms with an ISO timestamp, with or without a priority.

A line that is none of these, or whose time is no time, goes to topic `access_log_rejects`: line
(from 1), reason, raw text. Blank lines are skipped. A damaged gzip file fails the job. Text is
UTF-8; other bytes are shown as `\\xNN` and NUL as `\\x00`; they do not make a line a reject.

`time` is UTC. RFC 3164 times say neither year nor zone, so theirs is null: `time_text` has what
was written. `-` is null. A request that is not three words keeps its text in `request` and has no
`method`, `target` and `protocol`. Quotes inside quotes stay escaped as they were.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern=[
        "*access*log*", "*.access", "*.access.gz",
        "*syslog*", "messages", "auth.log*", "kern.log*", "mail.log*", "daemon.log*",
    ],
    topic=["access_log", "syslog", "access_log_rejects"],
    version="1.0.0",
)  # fmt: skip

BATCH_ROWS = 5000

ACCESS = re.compile(
    r"(?:(?P<virtual_host>[\w.-]+:\d+) )?(?P<client>\S+) (?P<identity>\S+) (?P<user>.+?) "
    r"\[(?P<time_text>[^\]]+)\] "
    r'"(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}|-) (?P<bytes>\d{1,18}|-)'
    r'(?: "(?P<referer>(?:[^"\\]|\\.)*)" "(?P<user_agent>(?:[^"\\]|\\.)*)")?'
    r"(?: (?P<extra>.*))?"
)
REQUEST = re.compile(r"(?P<method>\S+) (?P<target>\S+) (?P<protocol>\S+)")
SYSLOG_5424 = re.compile(
    r"<(?P<priority>\d{1,3})>1 (?P<time_text>\S+) (?P<host>\S+) (?P<program>\S+) (?P<pid>\S+) "
    r"(?P<message_id>\S+) "
    r'(?P<structured_data>-|(?:\[(?:[^\]"]|"(?:[^"\\]|\\.)*")*\])+)(?: (?P<message>.*))?'
)
SYSLOG_3164 = re.compile(
    r"(?:<(?P<priority>\d{1,3})>)?"
    r"(?P<time_text>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S*) "
    r"(?P<host>\S+) (?:(?P<program>[^\s:\[]+)(?:\[(?P<pid>[^\]]*)\])?: ?)?(?P<message>.*)"
)

MOMENT = pa.timestamp("us", "UTC")
ACCESS_SCHEMA = pa.schema(
    [("line", pa.int64()), ("time", MOMENT), ("time_text", pa.string())]
    + [(name, pa.string()) for name in ("virtual_host", "client", "identity", "user", "request")]
    + [(name, pa.string()) for name in ("method", "target", "protocol")]
    + [("status", pa.int64()), ("bytes", pa.int64())]
    + [(name, pa.string()) for name in ("referer", "user_agent", "extra")]
)
SYSLOG_SCHEMA = pa.schema(
    [("line", pa.int64()), ("time", MOMENT), ("time_text", pa.string())]
    + [("facility", pa.int64()), ("severity", pa.int64())]
    + [(name, pa.string()) for name in ("host", "program", "pid", "message_id")]
    + [("structured_data", pa.string()), ("message", pa.string())]
)
REJECTS = pa.schema([("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])
SCHEMAS = {
    "access_log": ACCESS_SCHEMA,
    "syslog": SYSLOG_SCHEMA,
    "access_log_rejects": REJECTS,
}


class Handler(BasePlugin):
    """Publishes the lines of one log file."""

    def execute(self, file_path: str) -> None:
        with open_bytes(file_path) as file:
            lines = read_lines(file)
            while batch := list(islice(lines, BATCH_ROWS)):
                judged = [judge(number, line) for number, line in batch]
                for topic, schema in SCHEMAS.items():
                    rows = [row for to, row in judged if to == topic]
                    if rows:
                        self.publish(topic, pa.Table.from_pylist(rows, schema=schema))


def open_bytes(path: str) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def read_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, str]]:
    """Line numbers and lines that are not blank.

    Raises:
        ValueError: the file is a damaged gzip file.
    """
    try:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
                yield number, text.replace("\0", "\\x00")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the gzip file is damaged: {error}") from error


def judge(number: int, line: str) -> tuple[str, dict[str, Any]]:
    """The line's topic and its row there."""
    try:
        if match := ACCESS.fullmatch(line):
            return "access_log", {"line": number, **access_row(nulled(match))}
        if match := SYSLOG_5424.fullmatch(line) or SYSLOG_3164.fullmatch(line):
            return "syslog", {"line": number, **syslog_row(nulled(match))}
        reason = "neither an access log line nor a syslog line"
    except (ValueError, OverflowError) as error:
        reason = str(error)
    return "access_log_rejects", {"line": number, "reason": reason, "raw": line}


def nulled(match: re.Match[str]) -> dict[str, Any]:
    return {name: None if text == "-" else text for name, text in match.groupdict().items()}


def access_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its request taken apart.

    Raises:
        ValueError: the time is no time.
    """
    request = REQUEST.fullmatch(row["request"] or "")
    moment = datetime.strptime(row["time_text"] or "", "%d/%b/%Y:%H:%M:%S %z").astimezone(UTC)
    numbers = {name: row[name] and int(row[name]) for name in ("status", "bytes")}
    return {**row, **(request.groupdict() if request else {}), **numbers, "time": moment}


def syslog_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its priority taken apart, and its time where year and zone are known.

    Raises:
        ValueError: the time is no time.
    """
    text = row["time_text"]
    moment = datetime.fromisoformat(text) if text and text[0].isdigit() else None
    priority = row["priority"] and int(row["priority"])
    facility, severity = (None, None) if priority is None else divmod(priority, 8)
    return {
        **row,
        "time": moment.astimezone(UTC) if moment and moment.tzinfo else None,
        "facility": facility,
        "severity": severity,
    }
