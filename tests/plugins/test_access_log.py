"""`plugins/access_log.py`: lines of web servers and of syslog daemons."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from casparian_flow.db.routing import compile_pattern
from tests.plugins.conftest import Run, load

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


T = '[10/Oct/2024:13:55:36 +0200] "GET /x HTTP/1.1" 200 12'
HEADS = {
    "203.0.113.9, 10.0.0.1 - -": (None, "203.0.113.9", "203.0.113.9, 10.0.0.1", None, None),
    "203.0.113.9,10.0.0.1:80 - -": (None, "203.0.113.9", "203.0.113.9,10.0.0.1:80", None, None),
    "[2001:db8::1]:443, ::1 - -": (None, "2001:db8::1", "[2001:db8::1]:443, ::1", None, None),
    "unknown, 10.0.0.1 - bob": (None, None, "unknown, 10.0.0.1", None, "bob"),
    "10.1.1.1 2607:5300:60:2c74:: - -": (None, "10.1.1.1", "2607:5300:60:2c74::", None, None),
    "9.9.9.9 8.8.8.8, 7.7.7.7 - -": (None, "9.9.9.9", "8.8.8.8, 7.7.7.7", None, None),
    "8.8.8.8, 7.7.7.7 9.9.9.9 - -": (None, "9.9.9.9", "8.8.8.8, 7.7.7.7", None, None),
    "9.9.9.9 - - bob": (None, "9.9.9.9", None, None, "bob"),
    "- 9.9.9.9 - bob": (None, "9.9.9.9", None, None, "bob"),
    "[::1]:443 ::1 - -": ("[::1]:443", "::1", None, None, None),
    "10.0.0.7:80 9.9.9.9 - -": ("10.0.0.7:80", "9.9.9.9", None, None, None),
    "www.example.org 9.9.9.9 - -": ("www.example.org", "9.9.9.9", None, None, None),
    "www.example.org:443 9.9.9.9 - -": ("www.example.org:443", "9.9.9.9", None, None, None),
    "www.example.org:443 - - -": ("www.example.org:443", None, None, None, None),
    "www.example.org a.example.net - -": ("www.example.org", "a.example.net", None, None, None),
    "_ 9.9.9.9 - -": ("_", "9.9.9.9", None, None, None),
    "localhost 9.9.9.9, 8.8.8.8 - -": ("localhost", "9.9.9.9", "9.9.9.9, 8.8.8.8", None, None),
    "w.example.org 9.9.9.9 8.8.8.8, 7.7.7.7 - b c": (
        "w.example.org", "9.9.9.9", "8.8.8.8, 7.7.7.7", None, "b c"
    ),
    "9.9.9.9 www.example.org - -": ("www.example.org", "9.9.9.9", None, None, None),
    "9.9.9.9 www.example.org -": ("www.example.org", "9.9.9.9", None, None, None),
    "1.2.3.4 identd bob [jr] smith": (None, "1.2.3.4", None, "identd", "bob [jr] smith"),
    '1.2.3.4 - ""': (None, "1.2.3.4", None, None, '""'),
    "burger.letters.com - -": (None, "burger.letters.com", None, None, None),
    "fe80::1%eth0 - -": (None, "fe80::1%eth0", None, None, None),
    "[2001:db8::1] - bob": (None, "[2001:db8::1]", None, None, "bob"),
    "unix: - -": (None, "unix:", None, None, None),
    "- - -": (None, None, None, None, None),
    "\0\0\0001.2.3.4 - -": (None, "1.2.3.4", None, None, None),
}  # fmt: skip
"""What stands before the time: virtual host, client, forwarded for, identity, user."""

NO_HEADS = [
    "999.1.2.3 - -", "1.2.3 - -", "<x> - -", "1.2.3.4:5678 - -",
    "2024-01-01 10:00:00 1.2.3.4 - -",
    "2024-01-01T10:00:00.1Z stdout F 1.2.3.4 - -", "web_1 | 1.2.3.4 - -", "web_1  | 1.2.3.4 - -",
    "1.2.3.4 9.9.9.9 bob", "1.2.3.4 5.6.7.8 9.9.9.9 - -", "1.2.3.4 -", "1.2.3.4", "1.2.3.4 - ",
    "1.2.3.4  -", "evil|sh, 1.2.3.4 - -", "1.2.3.4 - x 5.6.7.8", "ts,ip", "'1.2.3.4' - -",
    "1.2.3.4 a.example.net bob smith", "[1:2] - -", "203.0.113.9, - -", "-.example.org - -",
]  # fmt: skip

REJECTED = [
    # of other servers and programs
    "2015-05-13T23:39:43.945958Z my-lb 192.168.131.39:2817 10.0.0.1:80 0.00007 0.001 0.00005 200 "
    '200 0 29 "GET http://www.example.com:80/ HTTP/1.1" "curl/7.38.0" - -',
    "http 2018-07-02T22:23:00.186641Z app/my-lb/50 192.168.131.39:2817 10.0.0.1:80 0.0 0.0 0.0 200 "
    '200 34 366 "GET http://www.example.com:80/ HTTP/1.1" "curl/7.46.0" - -',
    '79a5 bucket [06/Feb/2019:00:00:38 +0000] 192.0.2.3 79a5 3E57 REST.GET k "GET /k HTTP/1.1" 200',
    "1286536308.779 180 192.168.0.224 TCP_MISS/200 411 GET http://example.org/ - DIRECT/1.2.3.4 -",
    "[Sun Dec 04 04:47:44 2005] [error] [client 1.2.3.4] File does not exist: /var/www",
    '{"level":"info","ts":1646861401.5,"request":{"remote_ip":"127.0.0.1","method":"GET"}}',
    "2024-01-01 10:00:00 10.0.0.1 GET /x - 80 - 1.2.3.4 curl/8 - 200 0 0 15",
    "2024-01-01T10:00:00Z INFO server: started", "2024-01-01T10:00:00Z,host,program: text",
    "ts,ip", "1,2", "Oct 11 22:14:15,host,su: x", "Oct 11 22:14:15 1,2 su: x",
    # no time, no status, no size
    '1.2.3.4 - - [31/Feb/2018:16:19:27 +0000] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:60 +0000] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Mai/2018:16:19:20 +0000] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Mär/2018:16:19:20 +0000] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0075] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20] "GET / HTTP/1.1" 200 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET / HTTP/1.1" 600 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET / HTTP/1.1" 000 8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET / HTTP/1.1" 200 -8',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET / HTTP/1.1" 200 007',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET / HTTP/1.1" 200',
    "Feb 30 22:14:15 host su: x", "Oct 11 24:14:15 host su: x", "Okt 11 22:14:15 host su: x",
    "<192>Oct 11 22:14:15 host su: x", "<34>Oct 11 22:14:15 999.1.1.1 su: x",
    "2025-13-03T10:00:00+01:00 host systemd[1]: x", "<14>1 2025-02-30T10:00:00Z - - - - -",
    # quotes that nobody escaped, parts that are lost
    f'1.2.3.4 - - {T} "-" "bad " quote"', f'1.2.3.4 - - {T} "-" "a" b" x "c"',
    f'1.2.3.4 - - {T} "-" "curl', f'1.2.3.4 - - {T} "-" "M" rt="0.1',
    '1.2.3.4 - - [16/Apr/2018:16:19:20 +0000] "GET /?q="x" HTTP/1.1" 200 8',
    f'1.2.3.4 - - {T} "-" "Mo\0\0\0\0 5.6.7.8 - - {T} "-" "x"',
]  # fmt: skip

NAMES = """
    access.log access.log.1 access.log.2.gz access_log access_log-20240101 ssl_access_log
    www.example.org-access.log x.access other_vhosts_access.log
    localhost_access_log.2024-01-01.txt access-2024-01-01.log ACCESS.LOG access.log-20240101.gz
    access_log_20240101 syslog syslog.1 syslog.2.gz messages messages-20240101 auth.log.1 kern.log
"""
NO_NAMES = """
    accessories_catalog.csv access_log_2024.csv .access.log.swp access.log~ access.log.xlsx
    access_control.csv catalog.txt syslog_report.csv messages.csv auth.log.csv accesslog.json
    blog_access.docx access.py error.log
"""


@pytest.mark.parametrize(
    ("names", "wanted"), [(NAMES, True), (NO_NAMES, False)], ids=["logs", "others"]
)
def test_patterns(names: str, wanted: bool) -> None:
    patterns = [compile_pattern(p, any_case=True) for p in load("access_log").MANIFEST.pattern]
    assert {n for n in names.split() if any(p.match(n) for p in patterns) is not wanted} == set()


@pytest.mark.parametrize("head", HEADS)
def test_what_stands_before_the_time(head: str, access_log: Run, tmp_path: Path) -> None:
    row = one_row(access_log, tmp_path, f'{head} {T} "-" "curl"')
    names = ("virtual_host", "client", "forwarded_for", "identity", "user")
    assert tuple(row[name] for name in names) == HEADS[head]
    assert (row["status"], row["bytes"], row["user_agent"]) == (200, 12, "curl")


@pytest.mark.parametrize("line", [*(f"{head} {T}" for head in NO_HEADS), *REJECTED])
def test_what_is_no_log_line_is_a_reject(line: str, access_log: Run, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    file.write_text(line + "\n", "utf-8")
    out = access_log(file)
    assert out.keys() == {"access_log_rejects"}
    (row,) = out["access_log_rejects"].to_pylist()
    assert (row["line"], row["raw"]) == (1, line.replace("\0", "\\x00"))
    assert row["reason"]


@pytest.mark.parametrize(
    ("extra", "forwarded"),
    [
        ('"1.2.3.4, 5.6.7.8"', "1.2.3.4, 5.6.7.8"),
        ('"2001:db8::1" 0.002', "2001:db8::1"),
        ('"-"', None),
        ('"127.0.0.1:8080"', None),
        ("www.example.org 0.001", None),
        ('rt=0.005 uct="0.001" urt="0.004"', None),
        (r'"with \" inside"', None),
    ],
)
def test_what_a_server_adds(
    extra: str, forwarded: str | None, access_log: Run, tmp_path: Path
) -> None:
    row = one_row(access_log, tmp_path, f'9.9.9.9 - - {T} "-" "curl" {extra}')
    assert (row["extra"], row["forwarded_for"], row["client"]) == (extra, forwarded, "9.9.9.9")


def test_a_date_and_words_are_no_syslog_line(access_log: Run, tmp_path: Path) -> None:
    time = "Oct 11 22:14:15"
    file = tmp_path / "messages"
    lines = [
        f"{time} Starting the server", f"{time} host -- MARK --", f"{time} host text",
        f"{time} host su[1]: x", f"{time} host text", f"<13>{time} other text",
        f"{time} combo syslogd 1.4.1: restart.", f"{time} other text",
        "<34>1 2003-10-11T22:14:15.003Z h su - - - \ufefftext",
    ]  # fmt: skip
    file.write_text("\n".join(lines) + "\n", "utf-8")
    out = access_log(file)
    assert out["access_log_rejects"].column("line").to_pylist() == [1, 3, 8]
    assert out["syslog"].column("message").to_pylist()[-1] == "text"


def test_guesses_are_told(
    access_log: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_row(access_log, tmp_path, f"9.9.9.9 - - {T}")
    assert capsys.readouterr().out == ""
    one_row(access_log, tmp_path, f"9.9.9.9 8.8.8.8 - - {T}")
    one_row(access_log, tmp_path, f"9.9.9.9 www.example.org - {T}")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and all(line.startswith("guessed: ") for line in told)
    one_row(access_log, tmp_path, f"\0\0\0009.9.9.9 - - {T}")
    assert "NUL" in capsys.readouterr().out


def test_holes_and_endless_lines(access_log: Run, tmp_path: Path) -> None:
    limit = load("access_log").LINE_LIMIT
    good = f"9.9.9.9 - - {T}\n".encode()
    file = tmp_path / "access.log"
    for hole in (1, limit - 10, limit, 3 * limit + 5):
        file.write_bytes(good + bytes(hole) + good + bytes(hole))
        assert access_log(file)["access_log"].column("line").to_pylist() == [1, 2]
    for size in (limit - 1, limit, 2 * limit + 1, 3 * limit):
        file.write_bytes(b"x" * size + b"\n" + good)
        out = access_log(file)
        assert out["access_log"].column("line").to_pylist() == [2]
        (reject,) = out["access_log_rejects"].to_pylist()
        assert reject["line"] == 1 and set(reject["raw"]) == {"x"}


def test_a_file_that_ends_inside_a_line(access_log: Run, tmp_path: Path) -> None:
    whole = f'9.9.9.9 - - {T}34 "-" "curl/8"'
    file = tmp_path / "access.log"
    for cut in range(1, len(whole)):
        file.write_text(f"{whole}\n{whole[:cut]}")
        out = access_log(file)
        assert out["access_log"].num_rows == 1, whole[:cut]
        assert out["access_log_rejects"].num_rows == 1
    file.write_text(f"{whole}\n{whole}")
    assert access_log(file)["access_log"].num_rows == 2


def test_nothing_in_it(access_log: Run, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    for content in (b"", b"\n \r\n", gzip.compress(b"")):
        file.write_bytes(content)
        assert access_log(file) == {}


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + bytes(40), b"%PDF-1.7\n", "9.9.9.9 - - x\n".encode("utf-16")],
    ids=["zip", "pdf", "utf-16"],
)
def test_other_kinds_of_files_fail(content: bytes, access_log: Run, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="this is"):
        access_log(file)


def test_topics_are_those_of_the_manifest(tmp_path: Path) -> None:
    module = load("access_log")
    object.__setattr__(module.MANIFEST, "topic", ["a", "b", "c"])
    seen: list[str] = []
    handler = module.Handler()
    handler._publish = lambda topic, data: seen.append(topic)
    file = tmp_path / "access.log"
    file.write_text(f"9.9.9.9 - - {T}\nOct 11 22:14:15 host su: x\nnone\n")
    handler.execute(str(file))
    assert seen == ["a", "b", "c"]


def one_row(access_log: Run, folder: Path, line: str) -> dict[str, Any]:
    file = folder / "access.log"
    file.write_text(line + "\n")
    out = access_log(file)
    assert out.keys() == {"access_log"}, out
    (row,) = out["access_log"].to_pylist()
    return dict(row)


TEXTS = [
    "",
    "a",
    "é",
    "\\",
    '"',
    "\t",
    " ",
    "[x]",
    "-",
    "1.2.3.4",
    ", ",
    "'",
    "\x7f",
    "日本",
    "%20",
    "\\x",
    "://",
]


def apache(text: str) -> str:
    """As mod_log_config escapes what a client sent."""
    named = {"\t": "\\t", "\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    plain = (named.get(c) or (c if " " <= c <= "~" else _hex(c)) for c in text)
    return "".join(plain)


def nginx(text: str) -> str:
    """As `escape=default` does."""
    return "".join(c if " " <= c <= "~" and c not in '"\\' else _hex(c) for c in text)


def _hex(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def some(rng: random.Random) -> str:
    return "".join(rng.choice(TEXTS) for _ in range(rng.randrange(6))) or "-"


def an_address(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return ".".join(str(rng.randrange(256)) for _ in range(4))
    return f"2001:db8::{rng.randrange(1 << 16):x}"


def a_name(rng: random.Random) -> str:
    return ".".join(rng.choice(["www", "a-b", "x_y", "example"]) for _ in range(3)) + ".org"


def a_line(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A line as a server writes it, and what is in it."""
    escaped = rng.choice([apache, nginx])
    moment = datetime(2000, 1, 1, tzinfo=timezone(timedelta(minutes=15 * rng.randrange(-48, 57))))
    moment += timedelta(seconds=rng.randrange(10**9))
    client = rng.choice([an_address, a_name, lambda _: "-"])(rng)
    user = rng.choice(
        ["-", escaped(" ".join(rng.choice(["bob", '"', "[x]", "é"]) for _ in range(3)))]
    )
    row: dict[str, Any] = {
        "virtual_host": None, "client": client, "forwarded_for": None,
        "identity": rng.choice(["-", "frank"]), "user": user,
        "time": moment.astimezone(UTC), "time_text": moment.strftime("%d/%b/%Y:%H:%M:%S %z"),
        "status": rng.choice([100, 200, 404, 599]), "bytes": rng.choice(["-", 0, 10**17]),
        "request": rng.choice([f"GET /{escaped(some(rng))} HTTP/1.1", escaped(some(rng))]),
        "referer": None, "user_agent": None, "extra": None,
    }  # fmt: skip
    head = [client]
    if rng.random() < 0.3 and client not in "-" and ":" in client + an_address(rng):
        row["virtual_host"] = rng.choice([f"{a_name(rng)}:443", "[::1]:80"])
        head.insert(0, row["virtual_host"])
        row["identity"] = "-"
    elif rng.random() < 0.3:
        addresses = [an_address(rng) for _ in range(rng.randrange(2, 4))]
        row["forwarded_for"] = ", ".join(addresses)
        row["client"], head = addresses[0], [row["forwarded_for"]]
    line = " ".join([*head, row["identity"], user, f"[{row['time_text']}]"])
    line += f' "{row["request"]}" {row["status"]} {row["bytes"]}'
    if rng.random() < 0.8:
        row["referer"], row["user_agent"] = escaped(some(rng)), escaped(some(rng))
        line += f' "{row["referer"]}" "{row["user_agent"]}"'
        if rng.random() < 0.3:
            row["extra"] = rng.choice(
                ["0.005", f'12 "{escaped(some(rng))}"', f'k="{escaped("x")}"']
            )
            line += f" {row['extra']}"
    return line, {name: None if value == "-" else value for name, value in row.items()}


def test_lines_of_servers_come_back_field_by_field(
    access_log: Run, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    lines, rows = zip(*(a_line(rng) for _ in range(3000)), strict=True)
    file = tmp_path / "access.log"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    out = access_log(file)
    assert out.keys() == {"access_log"}, out["access_log_rejects"].to_pylist()[:3]
    for line, wanted, row in zip(lines, rows, out["access_log"].to_pylist(), strict=True):
        assert {name: row[name] for name in wanted} == wanted, line


def written(row: dict[str, Any]) -> Iterator[str]:
    """Every line that has these fields in some order of ours."""
    host, client, forwarded = (
        row[name] or "-" for name in ("virtual_host", "client", "forwarded_for")
    )
    heads = [[client], [forwarded], [host, client], [client, host], [host, forwarded]]
    heads += [[client, forwarded], [forwarded, client], [host, client, forwarded]]
    heads += [[host, forwarded, client], [client, host]]
    who = [row["identity"] or "-", row["user"] or "-"]
    heads = [[*head, *who] for head in heads] + [[client, host, who[1]]]
    told = row["status"] or "-", "-" if row["bytes"] is None else row["bytes"]
    request = "-" if row["request"] is None else row["request"]
    agent = [row[name] if row[name] is not None else "-" for name in ("referer", "user_agent")]
    agents = [f' "{agent[0]}" "{agent[1]}"']
    if agent == ["-", "-"]:
        agents.append("")
    extras = [f" {row['extra']}"] if row["extra"] is not None else ["", " -"]
    for head, with_agent, extra in itertools.product(heads, agents, extras):
        start = f'{" ".join(head)} [{row["time_text"]}] "{request}" {told[0]} {told[1]}'
        yield f"{start}{with_agent}{extra}"


def damaged(rng: random.Random, line: str, other: str) -> str:
    at, to = sorted(rng.randrange(len(line) + 1) for _ in range(2))
    noise = rng.choice(['"', "\\", " ", "[", "]", "-", "\t", "x", ",", "1", ":", '" "', " - "])
    return rng.choice([
        line[:at] + line[to:], line[:at] + noise + line[at:], line[:at] + noise + line[at + 1 :],
        line[:at] + other[to:], line[:at] + line[at:to] * 2 + line[to:], other[:at] + line,
        " ".join(rng.sample(line.split(" "), len(line.split(" ")))), line[::-1],
    ])  # fmt: skip


def test_what_is_damaged_is_a_reject_or_a_row_that_says_the_line(
    access_log: Run, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    lines = [damaged(rng, a_line(rng)[0], a_line(rng)[0]) for _ in range(6000)]
    lines = [line for line in lines if line.strip()]
    file = tmp_path / "access.log"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    out = access_log(file)
    rejects = {row["line"]: row["raw"] for row in out["access_log_rejects"].to_pylist()}
    rows = {row["line"]: row for row in out["access_log"].to_pylist()}
    assert sorted([*rejects, *rows]) == list(range(1, len(lines) + 1))
    for number, line in enumerate(lines, start=1):
        assert rejects.get(number, line) == line
        if number in rows:
            assert line in set(written(rows[number])), rows[number]


def test_noise_is_rejected_line_by_line(access_log: Run, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    good = f"9.9.9.9 - - {T}".encode()
    noise = [rng.randbytes(rng.randrange(40)).replace(b"\n", b"x") for _ in range(4000)]
    noise += [rng.choice([b"\0", b" ", b"\r"]) * rng.randrange(5) for _ in range(200)]
    rng.shuffle(noise)
    file = tmp_path / "access.log"
    file.write_bytes(b"\n".join([good, *noise, good]))
    out = access_log(file)
    told = [n for n, line in enumerate(noise, start=2) if line.lstrip(b"\0").strip()]
    assert out["access_log_rejects"].column("line").to_pylist() == told
    assert out["access_log"].column("line").to_pylist() == [1, len(noise) + 2]


@pytest.mark.slow
def test_no_line_takes_more_than_one_pass(access_log: Run, tmp_path: Path) -> None:
    """Each would take hours if its time grew with the square of its length."""
    size = load("access_log").LINE_LIMIT - 200
    shapes = [
        '"', '\\"', "\\", " [", T + " ", f"{T}] ", "1.1.1.1, ", "1.1.1.1 ", "a.", "a-", "<14>1 ",
        '["',
        '[a="', "[a]", "- ", '" "', 'x="', "a:", "[10/Oct/2024:13:55:36 +0200] \"",
    ]  # fmt: skip
    starts = ["", f'1.1.1.1 - - {T} "-" "', f"1.1.1.1 - - {T} ", "<14>1 - - - - - [", "1.1.1.1 - "]
    file = tmp_path / "access.log"
    for start in starts:
        lines = [start + shape * (size // len(shape)) for shape in shapes]
        file.write_text("\n".join(lines) + "\n")
        assert sum(table.num_rows for table in access_log(file).values()) == len(lines)


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
            "'32/Oct/2000:13:55:36 -0700' is not a valid time: day is out of range for month",
            lines[4],
        ),
        (6, "neither an access log line nor a syslog line", lines[5]),
    ]
    assert out["access_log"].column("target")[1].as_py() == "/\\xff"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="the gzip file is damaged"):
        access_log(file)
