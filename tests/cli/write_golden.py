"""Writes what every command prints, in one short story, to golden.txt.

Run it with `python -m tests.cli.write_golden`; test_golden.py compares. A change of wording is one
diff of that file, and other tests need not hold whole sentences. `casparian demo` is not in it: it
runs these same commands (tests/e2e/test_demo.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from casparian_flow import config
from casparian_flow.cli import main
from casparian_flow.db.audit import actor
from casparian_flow.db.trust import person

GOLDEN = Path(__file__).parent / "golden.txt"

CONFIG = "\n[jobs]\nretry_seconds = 0.1\n[workers]\ncount = 1\n"

ORDERS = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(pattern="*.txt", topic=["orders", "orders_rejects"])

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        if "boom" in lines:
            print("about to fail")
            raise ValueError("no such order")
        good = [line for line in lines if not line.startswith("!")]
        bad = [(n, line) for n, line in enumerate(lines, 1) if line.startswith("!")]
        if good:
            self.publish("orders", pa.table({"line": good}))
        if bad:
            self.publish("orders_rejects", pa.table({
                "line": pa.array([n for n, _ in bad], pa.int64()),
                "reason": ["it begins with !"] * len(bad),
                "raw": [line for _, line in bad],
            }))
"""
FORBIDDEN = ORDERS.replace("import pyarrow as pa", "import pyarrow as pa\nimport subprocess")
NO_HANDLER = 'from casparian_flow.sdk import PluginMetadata\nMANIFEST = PluginMetadata(pattern="*")'

PLAIN = [  # what differs from run to run and from machine to machine
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?", "TIME"),
    (r"process \d+ on [^\s,)]+", "process PID on HOST"),
    (r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", "HASH"),
    (r"(?<![0-9a-f])(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{12,40}(?![0-9a-f])", "ID"),
    (r"(?<![0-9a-f])\d{12}(?![0-9a-f])", "ID"),  # one in 281 begins with twelve digits
    (rf"{re.escape(person())}", "ada@host"),
    (rf"(?<=TIME  ){re.escape(actor())}(?=  )", "ada"),
    (r"^\s*\d+ +(?=TIME)", "N  "),
    (r"\b(rows? |audit row )\d+( of the audit)?", r"\1N\2"),
    (r"\b\d[\d,]* audit rows", "N audit rows"),
    (r"(?<=head )( *)\d+(?=:)", r"\1N"),
    (r"\b\d+(\.\d+)? (s|MiB)\b(?= on | at most|$|;)", r"N \2"),
    (r"(?<= on )\d+-\d+(?=, TIME)", "WORKER"),
    (r"sandbox: .*", "sandbox: LAYERS"),
    (r"(?<=the last plugin ran under )[^)]*", "LAYERS"),
    (r"\b\d[\d,.]*( \w+)? of \d[\d,.]*(?= (bytes|GiB))", "N of N"),
    (r"\([\d,]+ bytes\)", "(N bytes)"),
    (r"(?<=artifact_size)( *)\d+|(?<=CURRENT)( *\d+ *)\d+(?= +/)", r"\1\2N"),
    (r"\b\d+ packages(?=,|\n)", "N packages"),
    (r"^  [\w.-]+==.*\n", ""),
    (r"^(surveyed|checked) [\d,]+ of .*\n", ""),  # at most one line a second
    (r"(?<=\S) {2,}", "  "),
]


class Scene:
    """A folder in which commands run; what they say is kept."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.flow = base / "flow"
        self.inbox = base / "in"
        self.flow.mkdir(parents=True)
        self.inbox.mkdir()
        self.told: list[str] = []

    def say(self, words: str) -> None:
        self.told.append(f"\n# {words}\n")

    def run(self, *arguments: str) -> str:
        """Run a command, and keep what it says to a terminal: both streams, as they come."""
        out = io.StringIO()
        root = logging.getLogger()
        with (
            contextlib.chdir(self.flow),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            mock.patch.object(sys, "argv", ["casparian", *arguments]),
            mock.patch.object(sys, "stdin", io.StringIO()),  # no terminal: nothing is asked
            mock.patch.object(root, "handlers", []),
        ):
            code: object = 0
            try:
                main()
            except SystemExit as ended:
                code = ended.code
        shown = " ".join(_quoted(word) for word in arguments)
        ended_with = f"[exit {int(code)}]\n" if code else ""  # type: ignore[call-overload]
        self.told.append(self._plain(f"\n$ casparian {shown}\n{out.getvalue()}{ended_with}"))
        return out.getvalue()

    def unheard(self, *arguments: str) -> str:
        """Run a command that is no part of the story; what it says."""
        said = self.run(*arguments)
        self.told.pop()
        return said

    @contextlib.contextmanager
    def daemon(self) -> Iterator[None]:
        """`casparian start`, in a process of its own; its counts are left out, for they race."""
        command = [sys.executable, "-m", "casparian_flow.cli", "start"]
        lines: list[str] = []
        with subprocess.Popen(
            command, cwd=self.flow, stderr=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if " worker" in line:
                    break
            at = len(self.told)
            yield
            process.send_signal(signal.SIGINT)
            lines += process.stderr.read().splitlines(keepends=True)
        said = "".join(line for line in lines if " | " not in line)
        self.told.insert(at, self._plain(f"\n$ casparian start\n{said}"))

    def write(self, name: str, text: str) -> None:
        """A file in the watched folder, whole at once: a daemon must not see half of it."""
        beside = self.base / name
        beside.write_text(text)
        beside.replace(self.inbox / name)

    def plugin(self, name: str, source: str) -> str:
        (self.flow / name).write_text(source)
        return f"./{name}"

    def _plain(self, text: str) -> str:
        places = {
            str(config.keys_folder()): "~/.config/casparian_flow",
            str(config.cache_folder()): "~/.cache/casparian_flow",
            str(self.base): "/home/ada",
            str(Path(sys.prefix).resolve()): "/venv",
            str(Path(__file__).parents[2]): "/lib",
        }
        for place, name in sorted(places.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(place, name)
        for pattern, plain in PLAIN:
            text = re.sub(pattern, plain, text, flags=re.MULTILINE)
        return "\n".join(line.rstrip() for line in text.split("\n"))


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w./:*=-]+", word) else f'"{word}"'


def text(base: Path) -> str:
    """The whole story, told in an absent or empty folder."""
    scene = Scene(base)
    for act in (begin, publish, scan, look, ask, outputs, change, tables, keys, watch, tamper):
        scene.say(act.__doc__ or "")
        act(scene)
    return "".join(scene.told).lstrip()


def begin(scene: Scene) -> None:
    """No configuration, then one; source roots"""
    scene.run("status")
    scene.run("init")
    scene.run("init")
    with (scene.flow / config.FILE_NAME).open("a") as file:
        file.write(CONFIG)
    scene.run("status")
    scene.run("source", "list")
    scene.run("source", "add", "nowhere")
    scene.run("source", "add", "../in", "--settle", "0")
    scene.run("source", "add", "../in")
    scene.run("source", "add", "..")
    scene.run("source", "add", "..", "--settle", "-1")
    scene.run("source", "set", "in", "--ignore", "*.tmp", "--min-age", "0")
    scene.run("source", "set", "in")
    scene.run("source", "set", "elsewhere", "--settle", "1")
    scene.run("source", "list")
    scene.run("source", "show", "in")
    scene.run("source", "show", "elsewhere")


def publish(scene: Scene) -> None:
    """Plugins: published, refused, shown"""
    scene.run("plugins", "list")
    scene.run("plugins", "bundled")
    scene.run("plugins", "bundled", "access_log")
    scene.run("rules", "list")
    scene.run("topics")
    scene.run("keys", "list")
    scene.run("publish", "orders")
    scene.run("publish", "./absent.py")
    scene.run("publish", scene.plugin("forbidden.py", FORBIDDEN))
    scene.run("publish", scene.plugin("no_handler.py", NO_HANDLER))
    orders = scene.plugin("orders.py", ORDERS)
    scene.run("publish", orders, "--option", "header")
    scene.run("publish", orders, "--topic", "sales")
    scene.run("publish", orders, "--version", "first")
    scene.run("publish", orders, "--dry-run")
    scene.run("publish", orders, "--version", "1.0.0")
    scene.run("publish", orders, "--version", "1.0.0")
    scene.plugin("orders.py", ORDERS + "# changed\n")
    scene.run("publish", orders, "--version", "1.0.0")
    scene.run("plugins", "list")
    scene.run("plugins", "show", "orders")
    scene.run("plugins", "show", "sales")
    scene.run("plugins", "verify")


def scan(scene: Scene) -> None:
    """Files: scanned, read, failed"""
    scene.run("files")
    scene.run("jobs")
    scene.run("outputs", "list")
    scene.write("good.txt", "one\ntwo\nthree\n")
    scene.run("scan")
    scene.write("bad.txt", "boom\n")
    scene.unheard("scan")  # by itself: in which order a scan finds files, the disk says
    scene.write("mixed.txt", "one\n!two\n")
    scene.unheard("scan")
    scene.write("rejects.txt", "!one\n!two\n")
    scene.unheard("scan")
    scene.write("notes.md", "nobody reads this\n")
    scene.run("scan")
    scene.run("scan", "elsewhere")
    scene.run("scan", "--drain")
    scene.run("scan", "--drain", "--quiet")
    scene.run("scan", "--scrub")
    scene.run("status")
    scene.run("status", "--check")


def look(scene: Scene) -> None:
    """What became of them"""
    scene.run("jobs")
    scene.run("jobs", "--rejects")
    scene.run("jobs", "--status", "nonsense")
    scene.run("jobs", "--limit", "1")
    scene.run("jobs", "--limit", "1", "--all")
    scene.run("jobs", "show", _job(scene, "good.txt"))
    scene.run("jobs", "show", _job(scene, "bad.txt"))
    scene.run("jobs", "show", "99")
    scene.run("jobs", "show", "99999999999999999999")
    scene.run("jobs", "retry")
    scene.run("jobs", "retry", _job(scene, "bad.txt"), "99")
    scene.run("jobs", "retry", _job(scene, "good.txt"))
    scene.run("jobs", "abort", _job(scene, "bad.txt"))
    scene.run("jobs", "abort", _job(scene, "bad.txt"))
    scene.run("jobs", "dismiss")
    scene.run("jobs", "dismiss", _job(scene, "good.txt"))
    scene.run("jobs", "dismiss", _job(scene, "rejects.txt"))
    scene.run("jobs", "retry", "--failed")
    scene.run("files")
    scene.run("files", "--gone")
    scene.run("files", "--copies")
    scene.run("files", "--unrouted")
    scene.run("files", "--unrouted", "--gone")
    scene.run("versions", "in/good.txt")
    scene.run("versions", "in/absent.txt")
    scene.run("cat", "in/good.txt", "--version", "2")


def ask(scene: Scene) -> None:
    """Queries"""
    scene.run("query", "SELECT line, _cf_job_id > 0 AS lineage FROM orders ORDER BY line")
    scene.run("query", "SELECT line FROM orders ORDER BY line", "--limit", "1")
    scene.run("query", "SELECT line FROM nowhere")
    scene.run("query", "DROP TABLE orders")
    scene.run("query", "SELECT 1; SELECT 2")
    scene.run("query", "SELEKT 1")
    scene.run("query", "SELECT 1", "--json", "--csv")


def outputs(scene: Scene) -> None:
    """Outputs: retracted, lost, restored, forgotten"""
    good = _job(scene, "good.txt")
    scene.run("outputs", "list")
    scene.run("retract", "in/good.txt")
    scene.run("retract", "in/good.txt")
    scene.run("outputs", "restore", good)
    scene.run("retract", "in/good.txt", "--undo")
    scene.run("retract", "in/good.txt", "--undo")
    scene.run("retract", "in/absent.txt")
    scene.run("outputs", "forget", good)
    scene.run("outputs", "restore", "99")
    scene.run("verify")
    _output(scene, good).unlink()
    scene.run("verify")
    scene.run("retract", "in/good.txt")
    scene.run("outputs", "restore", good)
    scene.run("retract", "in/good.txt", "--undo")
    scene.run("outputs", "restore", good)
    scene.run("scan", "--drain")
    _output(scene, good).unlink()
    scene.run("outputs", "forget", good)
    scene.run("verify")


def change(scene: Scene) -> None:
    """A new version of the plugin, rules and topics"""
    scene.run("publish", "./orders.py", "--version", "1.1.0")
    scene.run("plugins", "diff", "orders", "1.0.0", "1.1.0")
    scene.run("backfill", "orders", "--dry-run")
    scene.run("backfill", "orders", "--redo")
    scene.run("backfill", "sales")
    scene.run("scan", "--drain")
    scene.run("plugins", "disable", "orders", "1.1.0", "--reason", "too new")
    scene.run("plugins", "verify", "orders")
    scene.run("plugins", "activate", "orders", "1.0.0", "--reason", "it worked")
    scene.run("plugins", "activate", "orders", "9.9.9", "--reason", "it worked")
    scene.run("rules", "add", "*.md", "notes")
    scene.run("rules", "add", "*.md", "notes")
    scene.run("rules", "add", "[", "notes")
    scene.run("rules", "list")
    scene.run("rules", "remove", "2")
    scene.run("rules", "remove", "99")
    scene.run("topics")
    scene.run("topics", "set", "orders", "orders", "sqlite:///out.db", "--mode", "replace")
    scene.run("topics", "set", "orders", "orders", "ftp://out")
    scene.run("topics", "set", "orders", "orders", "parquet://out", "--mode", "sometimes")
    scene.run("topics", "set", "orders", "orders", "parquet://../in/out")
    scene.run("topics", "set", "orders", "invoices", "parquet://output")
    scene.run("topics", "remove", "orders", "orders", "--yes")
    scene.run("topics", "remove", "orders", "sales", "--yes")
    scene.run("topics", "remove", "orders", "invoices")
    scene.run("topics", "remove", "orders", "invoices", "--yes")
    scene.run("rebuild", "sales")
    scene.run("rebuild", "orders", "--cancel")
    scene.run("rebuild", "orders", "--dry-run")
    scene.run("rebuild", "orders")
    scene.run("rebuild", "orders")
    scene.run("topics", "set", "orders")
    scene.run("topics", "set", "orders", "--allow-empty")
    scene.run("topics", "set", "orders_rejects", "--allow-empty")
    scene.run("upgrade")
    scene.write("good.txt", "one\ntwo\nthree\nfour\n")
    (scene.inbox / "mixed.txt").unlink()
    scene.run("scan", "--drain")
    scene.run("files", "--gone")
    scene.run("status")
    scene.run("source", "set", "in", "--on-delete", "sometimes")
    scene.run("source", "set", "in", "--on-delete", "retract")
    scene.run("source", "set", "in", "--on-delete", "keep")


SALES = """\
Report of the bank
order;day;amount;city;zip
1;31.12.2025;1.234,50;Bern;03045
2;30.02.2026;7,25;Bern;10115
3;01.02.2026;0,10;Rome;20095
Total;;1.241,85;;
"""


def tables(scene: Scene) -> None:
    """Tables without code"""
    scene.run("table", "list")
    scene.run("table", "add", "sales", "sales_*.csv", "--yes")
    scene.run("table", "add", "sales")
    scene.write("sales_1.csv", SALES)
    scene.unheard("scan")
    scene.run("try", "delimited", "../in/sales_1.csv")
    scene.run("try", "nothing", "../in/sales_1.csv")
    options = ("--header", "order;.*", "--footer", "Total;.*", "--format", "day=%d.%m.%Y")
    scene.run("table", "add", "sales", "sales_*.csv", *options)
    scene.run("table", "add", "sales", "sales_*.csv", *options, "--type", "nowhere=date", "--yes")
    scene.run("table", "add", "sales", "sales_*.csv", *options, "--type", "amount=money", "--yes")
    scene.run("table", "add", "bank", "sales_*.csv", *options, "--yes")
    scene.run("table", "add", "bank", "sales_*.csv", *options, "--yes")
    scene.run("table", "add", "orders", "sales_*.csv", *options, "--yes")
    scene.run("scan", "--drain")
    scene.run("table", "list")
    scene.run("table", "show", "bank")
    scene.run("table", "show", "bank", "--toml")
    scene.run("table", "show", "orders")
    scene.run("try", "bank", "in/sales_1.csv")
    scene.run("table", "set", "bank")
    scene.run("table", "set", "bank", "--type", "day=text", "--redo", "--yes")
    scene.run("scan", "--drain")
    scene.write("sales_2.csv", SALES.replace("zip", "zip;tax").replace("5\n", "5;0,19\n"))
    scene.run("scan", "--drain")
    scene.run("table", "accept", "bank", "in/sales_1.csv")
    scene.run("table", "accept", "bank", "--yes")
    scene.run("scan", "--drain")
    scene.run("table", "diff", "bank")
    scene.run("table", "remove", "bank")
    for name in ("sales_1.csv", "sales_2.csv"):
        (scene.inbox / name).unlink()
    scene.unheard("scan")


def keys(scene: Scene) -> None:
    """Keys, the audit and a backup"""
    scene.run("keys", "generate")
    scene.run("keys", "list")
    scene.run("keys", "trust", "00", "--owner", "Bo")
    scene.run("keys", "trust", "ab" * 32, "--owner", "Bo", "--plugins", "sales_*")
    scene.run("keys", "revoke", "zz", "--reason", "lost")
    scene.run("keys", "rotate")
    own = next(row for row in _rows(scene, "keys list --json") if row["mine"])
    scene.run("keys", "revoke", str(own["key_id"]), "--reason", "lost")
    scene.run("audit", "show", "--limit", "5")
    scene.run("audit", "verify")
    scene.run("audit", "verify", "--head", "1")
    scene.run("audit", "verify", "--head", f"1:{'0' * 64}")
    scene.run("backup", "../ledger.sqlite3")
    scene.run("backup", "../ledger.sqlite3")
    scene.run("backup", "casparian_flow.sqlite3")
    scene.run("wait")
    scene.run("wait", "--idle")


def watch(scene: Scene) -> None:
    """The daemon"""
    with scene.daemon():
        scene.run("start")
        scene.run("status", "--check")
        scene.write("more.txt", "five\n")
        scene.run("wait", "--idle", "--timeout", "60")
        scene.run("wait", "--idle", "--timeout", "0")
        scene.run("jobs", "--limit", "1")
    scene.run("source", "remove", "in")
    scene.run("source", "remove", "in")
    scene.run("scan")


def tamper(scene: Scene) -> None:
    """The ledger, altered outside Casparian Flow"""
    database = sqlite3.connect(scene.flow / "casparian_flow.sqlite3")
    with contextlib.closing(database), database:
        triggers = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE cf_processing_queue SET status = 'ABORTED' WHERE id = 1")
        database.execute("UPDATE cf_processing_queue SET fence = fence + 1 WHERE id = 3")
        database.execute("UPDATE cf_file_version SET size_bytes = 1 WHERE id = 1")
        database.execute("DELETE FROM cf_audit WHERE seq = 2")
        database.execute("UPDATE cf_routing_rule SET priority = 7 WHERE id = 1")
        for _, sql in triggers:
            database.execute(sql)
        database.execute("DROP TRIGGER cf_attempt_no_delete")
    scene.run("verify")
    scene.run("audit", "verify")


def _rows(scene: Scene, command: str) -> list[dict[str, object]]:
    return json.loads(scene.unheard(*command.split()))  # type: ignore[no-any-return]


def _job(scene: Scene, file: str) -> str:
    rows = [row for row in _rows(scene, "jobs --json") if row["rel_path"] == file]
    return str(rows[0]["id"])


def _output(scene: Scene, job: str) -> Path:
    listed = _rows(scene, "outputs list --json")
    rows = [row for row in listed if str(row["job"]) == job and row["rows"]]
    return Path(str(rows[0]["target"]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        own = {f"XDG_{name}": f"{scratch}/{name}" for name in ("CONFIG_HOME", "RUNTIME_DIR")}
        Path(own["XDG_RUNTIME_DIR"]).mkdir(mode=0o700)
        with mock.patch.dict(os.environ, own):
            GOLDEN.write_text(text(Path(scratch) / "home"), "utf-8")
