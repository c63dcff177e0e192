# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1"]
# ///
"""Web server access logs and syslog become rows of topics `access_log` and `syslog`; also gzipped.

Each line is read on its own: it becomes a row with all its fields, or it goes to topic
`access_log_rejects` with its number (from 1), the reason and its text. Blank lines are skipped. A
damaged gzip file fails the job, and so does a file whose first bytes are those of another kind.

Access log: common and combined format. A virtual host may precede the client; the addresses of
`X-Forwarded-For` may be before the client, after it, or in its place. They are kept whole in
`forwarded_for`; if they are in the client's place, `client` is the first of them. Further text at
the end of a line is `extra`; if it begins with a quoted list of addresses right after the user
agent, as nginx writes it, `forwarded_for` has that list too. A client is an IP address, a host
name, `unix:` or `-`.
Syslog: RFC 5424, RFC 3164, and the forms of rsyslog and systemd with an ISO timestamp, with or
without a priority. A date followed by text is a syslog line only if it names a program, if lines
before it have the same host, or if the text is one that syslog daemons write.

Text stays as the server wrote it, with its escapes; only `-` is null. It is read as UTF-8; invalid
bytes become `\\xNN`. NUL bytes before a line's text, which a crash may leave, are skipped; a line
with NUL bytes in its text is rejected. `time` is UTC. It is null for RFC 3164, whose times have
neither year nor zone; `time_text` has the time as it was written. A request that is not method,
target and protocol is only in `request`.
"""

from __future__ import annotations

import calendar
import io
import re
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.sdk import (
    BasePlugin,
    PluginMetadata,
    batches,
    foreign_kind,
    open_bytes,
    printable,
)

MANIFEST = PluginMetadata(
    pattern=[
        "*access*([0-9 ._-])log*([0-9._-])?(.@(txt|log|old))?(.gz)",
        "*.access*([0-9._-])?(.gz)",
        "*syslog*([0-9._-])?(.@(txt|log|old))?(.gz)",
        "messages*([0-9._-])?(.gz)",
        "@(auth|kern|mail|daemon).log*([0-9._-])?(.gz)",
    ],
    topic=["access_log", "syslog", "access_log_rejects"],
    version="1.1.0",
)

LINE_LIMIT = 1 << 20
"""Bytes. No server writes a longer line, and a line must fit into memory."""

SHOWN = 1000
"""Bytes of a longer line that its reject keeps."""

CLF_TIME = r"\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d(?:\.\d{1,6})? [+-]\d{4}"
CLF = re.compile(
    r"(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d)(\.\d{1,6})? ([+-])(\d\d)(\d\d)", re.ASCII
)
TIME = re.compile(rf' \[(?P<time_text>{CLF_TIME})\] (?=")', re.ASCII)
"""The first match is the line's time, because servers escape quotes that a client sends."""
ANY_TIME = re.compile(r" \[(?P<time_text>[^\]\"]{1,100})\] (?=\")")
"""Finds an invalid time in its usual place, for the reject's reason."""

# The patterns below use possessive quantifiers (`++` and `*+`), which never backtrack, so that even
# a hostile line is matched in linear time.
QUOTED = r'(?:[^"\\]++|\\.)*+'
AFTER_TIME = re.compile(
    rf'"(?P<request>{QUOTED})" (?P<status>\d{{3}}|-) (?P<bytes>0|[1-9]\d{{0,17}}|-)'
    rf'(?: "(?P<referer>{QUOTED})" "(?P<user_agent>{QUOTED})"(?=\ |\Z))?+'
    r"(?: (?P<extra>.*+))?",
    re.ASCII,
)
EXTRA = re.compile(rf'(?:[^"]++|(?<![^\s=:,;\[({{])"{QUOTED}"(?![^\s,;\])}}]))*+')
"""Words, and quoted strings that begin and end at word boundaries: every quote has its partner."""
LISTED = re.compile(r'"(?P<list>[^"\\]+)"(?: .*)?', re.ASCII)
REQUEST = re.compile(
    r"(?P<method>[!#$%&'*+.^_`|~0-9A-Za-z-]+) (?P<target>\S+) (?P<protocol>[A-Za-z]+/\d[\w.]*)",
    re.ASCII,
)

ISO_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?"
PRIORITY = r"(?:<(?P<priority>\d{1,3})>)"
TAG = r"(?P<program>[^\s:\[]++)(?:\[(?P<pid>[^\]\s]*+)\])?:(?: |\Z)"
SYSLOG_5424 = re.compile(
    rf"{PRIORITY}1 (?P<time_text>-|{ISO_TIME}) "
    r"(?P<host>[!-~]{1,255}) (?P<program>[!-~]{1,48}) (?P<pid>[!-~]{1,128}) "
    r"(?P<message_id>[!-~]{1,32}) "
    r'(?P<structured_data>-|(?:\[(?:[^\]"]++|"(?:[^"\\]++|\\.)*+")*+\])++)(?: (?P<message>.*+))?',
    re.ASCII,
)
SYSLOG_3164 = re.compile(
    rf"{PRIORITY}?(?P<time_text>([A-Z][a-z]{{2}}) ([ \d]\d) (\d\d):(\d\d):(\d\d)) "
    rf"(?P<host>\S++) (?:{TAG})?(?P<message>.*+)",
    re.ASCII,
)
SYSLOG_ISO = re.compile(
    rf"{PRIORITY}?(?P<time_text>{ISO_TIME}) (?P<host>\S++) {TAG}(?P<message>.*+)", re.ASCII
)
SYSLOGS = (SYSLOG_5424, SYSLOG_3164, SYSLOG_ISO)

MONTHS = {
    "Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6,
    "Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12,
}  # fmt: skip
"""Servers write English names, whatever the locale."""
LEVELS = frozenset(
    ("TRACE", "DEBUG", "INFO", "NOTICE", "WARN", "WARNING", "ERROR", "ERR", "FATAL", "CRITICAL")
)
"""Log levels: in the host's place they show that the line is from a program's own log."""

IDENTITY = re.compile(r"[^\s:,|\[\]]+")
UNNAMED = re.compile(
    r"(?:-{2,} )?(?:last )?message repeated |-- MARK --|exiting on signal|\S+ [0-9.]+: "
)
"""Texts that syslog daemons write themselves, without a program's name."""
HOSTS = 1000
"""The most host names of a file that are remembered."""
LABELS = re.compile(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*+"
                    r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?")  # fmt: skip

MOMENT = pa.timestamp("us", "UTC")
ACCESS_SCHEMA = pa.schema(
    [("line", pa.int64()), ("time", MOMENT), ("time_text", pa.string())]
    + [(name, pa.string()) for name in ("virtual_host", "client", "forwarded_for")]
    + [(name, pa.string()) for name in ("identity", "user", "request")]
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
SCHEMAS = (ACCESS_SCHEMA, SYSLOG_SCHEMA, REJECTS)
ACCESS, SYSLOG, REJECT = range(3)
"""Kinds of lines: indexes of `SCHEMAS` and of the MANIFEST's topics."""

Row = dict[str, Any]


class Handler(BasePlugin):
    """Publishes the lines of one log file."""

    def execute(self, file_path: str) -> None:
        notes: Counter[str] = Counter()
        with open_bytes(file_path) as file:
            judged = judge_all(read_lines(file, notes), notes)
            for batch in batches(judged, lambda line: line.size):
                for kind, (topic, schema) in enumerate(zip(MANIFEST.topic, SCHEMAS, strict=True)):
                    rows = [line.row for line in batch if line.kind == kind]
                    if rows:
                        self.publish(topic, pa.Table.from_pylist(rows, schema=schema))
        for note, count in notes.items():
            lines = "line" if count == 1 else "lines"
            print(f"{note} ({count} {lines})")


class Line(NamedTuple):
    """One line of the file that is not blank."""

    number: int
    text: str
    fault: str = ""
    """The reason to reject it without reading it."""
    ended: bool = True
    """Whether a newline ends it."""


class Judged(NamedTuple):
    """A line as a row or a reject."""

    kind: int
    row: Row
    size: int


def read_lines(file: io.BufferedIOBase, notes: Counter[str]) -> Iterator[Line]:
    """The lines that are not blank, as text.

    Raises:
        ValueError: the file is of another kind.
    """
    refuse_other_kinds(file.peek(4096)[:4096])  # type: ignore[attr-defined]
    data = file.readline(LINE_LIMIT).removeprefix(b"\xef\xbb\xbf")
    number = 0
    while data:
        number += 1
        if data.startswith(b"\0"):
            notes["NUL bytes before the text of a line, as a crash leaves them, were skipped"] += 1
            data = after_nulls(data, file)
        ended, fault = data.endswith(b"\n"), ""
        if not ended and len(data) >= LINE_LIMIT:
            fault = f"the line is longer than {LINE_LIMIT:,} bytes; this is its beginning"
            data = data[:SHOWN]
            while more := file.readline(LINE_LIMIT):
                if more.endswith(b"\n"):
                    break
        elif b"\0" in data:
            fault = "NUL bytes inside the line: part of it is lost"
        if data.strip():
            text = data.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
            yield Line(number, printable(text), fault, ended)
        data = file.readline(LINE_LIMIT)


def refuse_other_kinds(start: bytes) -> None:
    """Check the first bytes of a file.

    Raises:
        ValueError: they are those of another kind of file.
    """
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("this is UTF-16 text; logs are read as UTF-8: convert it with iconv")
    if kind := foreign_kind(start):
        raise ValueError(f"this is {kind}, not a log")


def after_nulls(data: bytes, file: io.BufferedIOBase) -> bytes:
    """The rest of a line after any number of NUL bytes."""
    text = data.lstrip(b"\0")
    while not text and (data := file.readline(LINE_LIMIT)):
        text = data.lstrip(b"\0")
    if not text.endswith(b"\n") and len(data) >= LINE_LIMIT:
        text += file.readline(LINE_LIMIT)
    return text or b"\n"


def judge_all(lines: Iterator[Line], notes: Counter[str]) -> Iterator[Judged]:
    """Make each line a row or a reject, in view of the lines before it."""
    combined = False
    hosts: set[str] = set()
    for line in lines:
        kind, row = (REJECT, {"reason": line.fault}) if line.fault else judge(line.text, notes)
        if kind == SYSLOG and row["program"] is not None and len(hosts) < HOSTS:
            hosts.add(row["host"])
        elif kind == SYSLOG and not named_by_others(row, hosts):
            kind, row = REJECT, {"reason": "it names no program, and no earlier line has its host"}
        if kind == ACCESS:
            agent = row["user_agent"] is not None
            if combined and not agent and not line.ended:
                reason = "the file ends inside this line: earlier lines have a user agent"
                kind, row = REJECT, {"reason": reason}
            combined = combined or agent
        row = {name: None if value == "-" else value for name, value in row.items()}
        if kind == REJECT:
            row["raw"] = line.text
        yield Judged(kind, {**row, "line": line.number}, len(line.text))


def named_by_others(row: Row, hosts: set[str]) -> bool:
    """Whether a line without a program's name is a syslog line: a date and text are not enough."""
    known = row["facility"] is not None or row["host"] in hosts
    return known or UNNAMED.match(row["message"]) is not None


def judge(line: str, notes: Counter[str]) -> tuple[int, Row]:
    """The kind of a line, and its row. `-` is not replaced yet."""
    try:
        for pattern in SYSLOGS:
            if match := pattern.fullmatch(line):
                return SYSLOG, syslog_row(match)
        if time := TIME.search(line):
            return ACCESS, access_row(line, time, notes)
        if time := ANY_TIME.search(line):
            reason = f"{time['time_text']!r} is not a time like 10/Oct/2000:13:55:36 -0700"
            return REJECT, {"reason": reason}
        reason = "neither an access log line nor a syslog line"
    except (ValueError, OverflowError) as error:
        reason = str(error)
    return REJECT, {"reason": reason}


def access_row(line: str, time: re.Match[str], notes: Counter[str]) -> Row:
    """The fields of an access log line.

    Raises:
        ValueError: a field is invalid.
    """
    moment = clf_moment(time["time_text"])
    match = AFTER_TIME.fullmatch(line, time.end())
    if not match:
        raise ValueError(
            "what follows the time is not a quoted request, a status and a size, or a quote inside "
            "a field is not escaped"
        )
    row: Row = match.groupdict()
    if row["extra"] is not None and not EXTRA.fullmatch(row["extra"]):
        raise ValueError("a quote is not escaped, so the end of a field is ambiguous")
    if row["status"] != "-":
        row["status"] = int(row["status"])
        if not 100 <= row["status"] <= 599:
            raise ValueError(f"{match['status']} is not a status")
    if row["bytes"] != "-":
        row["bytes"] = int(row["bytes"])
    row |= read_head(line[: time.start()].split(" "), notes)
    if row["forwarded_for"] is None and row["user_agent"] is not None:
        row["forwarded_for"] = forwarded_at_the_end(row["extra"])
    if request := REQUEST.fullmatch(row["request"]):
        row |= request.groupdict()
    return {**row, "time_text": time["time_text"], "time": moment}


@lru_cache(1024)
def clf_moment(text: str) -> datetime:
    """The time of an access log line in UTC.

    Raises:
        ValueError: the time is invalid.
    """
    match = CLF.fullmatch(text)
    if not match or match[2] not in MONTHS or int(match[10]) > 59:
        raise ValueError(f"{text!r} is not a time like 10/Oct/2000:13:55:36 -0700")
    offset = timedelta(hours=int(match[9]), minutes=int(match[10]))
    micro = int((match[7] or ".")[1:].ljust(6, "0"))
    try:
        return datetime(
            int(match[3]), MONTHS[match[2]], int(match[1]), int(match[4]), int(match[5]),
            int(match[6]), micro, timezone(-offset if match[8] == "-" else offset),
        ).astimezone(UTC)  # fmt: skip
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a valid time: {error}") from None


def forwarded_at_the_end(extra: str | None) -> str | None:
    """The quoted addresses of `X-Forwarded-For` after the user agent, as nginx writes them."""
    match = LISTED.fullmatch(extra or "")
    if match and all(kind(item.strip()) == "a" for item in match["list"].split(",")):
        return match["list"]
    return None


READINGS = [
    (re.compile(pattern), roles)
    for pattern, roles in (
        ("[nhps]a[al]", "VCX"), ("[nhps]la", "VXC"),
        ("[nhps-]a", "VC"), ("[nhps-]l", "VL"),
        ("a[al]", "CX"), ("la", "XC"),
        ("a[np](?=-)", "CV"), ("[nps][nh](?=-)", "VC"),
        ("(?:[ps-])-(?=-)", "VC"), ("a-(?=-)", "CX"),
        ("[anh-]", "C"), ("l", "L"),
    )
]  # fmt: skip
"""Kinds of the first words of a line (see `kind`) -> their roles: [V]irtual host, [C]lient,
[X]-Forwarded-For, or that [L]ist in the client's place."""
ROLES = {"V": "virtual_host", "C": "client", "X": "forwarded_for", "L": "forwarded_for"}
TWO_ADDRESSES = (
    "guessed: of two addresses before the user the first is the client, the second X-Forwarded-For"
)
HOST_SECOND = "guessed: a host name between client and user is the virtual host, as in lighttpd"


def read_head(words: list[str], notes: Counter[str]) -> Row:
    """The fields before the time: [virtual host] client [forwarded for] identity user.

    Only the user's name and a list of addresses may contain spaces.

    Raises:
        ValueError: the fields cannot be told apart, or the client is invalid.
    """
    row: Row = dict.fromkeys(("virtual_host", "client", "forwarded_for"))
    groups, ends = grouped(words)
    kinds = "".join(map(kind, groups))
    for pattern, roles in READINGS:
        if pattern.match(kinds) and len(words) - ends[len(roles) - 1] >= 2:
            break
    else:
        raise ValueError(f"{groups[0][:100]!r} is neither an IP address nor a host name")
    row |= {ROLES[role]: group for role, group in zip(roles, groups, strict=False)}
    if roles.endswith("L"):
        first = row["forwarded_for"].split(",")[0]
        row["client"] = "-" if first == "unknown" else without_port(first)
    identity, *names = words[ends[len(roles) - 1] :]
    what = kind(identity)
    if roles == "C" and len(names) == 1 and kinds[0] in "a-" and (
        what in "np" or identity == "localhost"
    ):  # fmt: skip
        row["virtual_host"], identity, what = identity, "-", "-"
        notes[HOST_SECOND] += 1
    if what in "alnps" or not IDENTITY.fullmatch(identity):
        raise ValueError("the text before the time is not client, identity and user")
    if not names[0] or (len(names) > 1 and any(kind(name) == "a" for name in names)):
        raise ValueError("the text before the time is not client, identity and user")
    if re.match("[nhps]?aa", kinds) and "X" in roles:
        notes[TWO_ADDRESSES] += 1
    return {**row, "identity": identity, "user": " ".join(names)}


def grouped(words: list[str]) -> tuple[list[str], list[int]]:
    """The first four words, where words joined by commas count as one; and the end of each."""
    groups: list[str] = []
    ends: list[int] = []
    end = 0
    while end < len(words) and len(groups) < 4:
        start = end
        while words[end].endswith(",") and end < len(words) - 1:
            end += 1
        end += 1
        groups.append(" ".join(words[start:end]))
        ends.append(end)
    return groups, ends


def kind(word: str) -> str:
    """The kind of a word: IP [a]ddress, [l]ist of addresses, [n]ame with a dot, [h]ost name without
    one, name with a [p]ort, addre[s]s with a port, `-`, or [x] for none of these."""
    if "," in word:
        items = [item.strip() for item in word.split(",")]
        return "l" if all(kind_of_one(item[:300]) in "anhs-" for item in items) else "x"
    return kind_of_one(word[:300])


@lru_cache(4096)
def kind_of_one(word: str) -> str:
    if word == "-":
        return "-"
    if word in ("_", "*"):
        return "p"  # names of a default server
    if word == "unix:" or is_address(word) or (word[:1] + word[-1:] == "[]" and ":" in word):
        return "a" if word == "unix:" or is_address(word.strip("[]")) else "x"
    if is_name(word):
        return "n" if "." in word.rstrip(".") else "h"
    host = without_port(word)
    if host != word:
        return "s" if is_address(host) else "p" if is_name(host) or host in "_*" else "x"
    return "x"


def without_port(word: str) -> str:
    """The host of `host:port`, `[address]:port` and `[address]`; else the whole word."""
    if match := re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::\d{1,5})?|([^:]+):\d{1,5}", word):
        return match[1] or match[2]
    return word


def is_address(word: str) -> bool:
    try:
        ip_address(word)
    except ValueError:
        return False
    return True


def is_name(word: str) -> bool:
    """Whether a word is a host name. One that ends in a number may be an address but not a name;
    one without a letter is a number or a date."""
    last = word.rstrip(".").rpartition(".")[2]
    return (
        len(word) <= 253
        and LABELS.fullmatch(word) is not None
        and not last.isdecimal()
        and any(letter.isalpha() for letter in word)
    )


def syslog_row(match: re.Match[str]) -> Row:
    """The fields of a syslog line. The time is null unless year and zone are known.

    Raises:
        ValueError: time, priority or host is invalid.
    """
    row: Row = match.groupdict()
    text = row["time_text"]
    moment = None
    if match.re is SYSLOG_3164:
        month, day, hour, minute, second = match.group(3, 4, 5, 6, 7)
        days = 29 if month == "Feb" else calendar.mdays[MONTHS.get(month, 0)]
        if not (1 <= int(day) <= days and hour < "24" and minute < "60" and second < "61"):
            raise ValueError(f"{text!r} is not a valid time")
    elif text != "-":
        moment = datetime.fromisoformat(text)
    priority = row.pop("priority")
    if priority is not None and int(priority) > 191:
        raise ValueError(f"{priority} is not a syslog priority")
    if match.re is not SYSLOG_5424 and kind(row["host"]) not in "anh":
        raise ValueError(f"{row['host'][:100]!r} is neither an IP address nor a host name")
    if match.re is SYSLOG_ISO and row["host"].upper() in LEVELS:
        raise ValueError(f"{row['host']!r} instead of a host name: a program's own log, not syslog")
    facility, severity = (None, None) if priority is None else divmod(int(priority), 8)
    if row["message"] is not None:
        row["message"] = row["message"].removeprefix("\ufeff")  # RFC 5424: marks UTF-8
    return {
        **row,
        "time": moment.astimezone(UTC) if moment and moment.tzinfo else None,
        "facility": facility,
        "severity": severity,
    }
