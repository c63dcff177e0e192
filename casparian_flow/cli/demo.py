"""`casparian demo`: runs the commands that a user would type, on messy sample files."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.errors import CasparianError, counted

if TYPE_CHECKING:
    from casparian_flow.cli.context import Line
    from casparian_flow.config import Settings
    from casparian_flow.db.access import Ledger, Row
    from casparian_flow.main import Daemon


WORKERS = 2
TICK_SECONDS = 0.1
PATIENCE_SECONDS = 120

FAMILIES = (
    ("sales", "sales_*.csv", "--format", "Tag=%d.%m.%Y"),
    ("visits", "visits_*.csv"),
)
"""The tables: name, files and options of each."""

TABLES = (
    "select Auftrag, Tag, Betrag, PLZ, _cf_job_id from sales",
    "select day, page, visits, _cf_job_id from visits",
    'select Auftrag, Kunde, "Betrag €", Datum, _cf_job_id from delimited where Auftrag is not null',
    "select station, city, name, name_2, _cf_job_id from delimited where station is not null",
    "select sensor, celsius, ok, tags, _cf_job_id from json",
    "select * exclude (_cf_source_hash, _cf_file_version_id, _cf_plugin_version) from excel",
)
REJECTS = (
    'select line, "column", value, rule, raw, _cf_job_id from sales_rejects',
    "select line, reason, raw, _cf_job_id from delimited_rejects_history",
    "select line, reason, raw, _cf_job_id from json_rejects",
)


def demo(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR", help="A directory that is new or empty; default: a temporary one."
        ),
    ] = None,
) -> None:
    """Try it on generated sample files.

    Runs in a directory of its own and leaves it there. Fails if a result is not as expected.
    """
    import time

    from casparian_flow import config

    began = time.monotonic()
    home = prepare(folder)
    with contextlib.chdir(home):
        _say("A watched directory of messy files")
        context.say(f"$ cd {shlex.quote(str(home))}")
        _casparian("init")
        _casparian("source", "add", INBOX, "--settle", str(SETTLE_SECONDS))
        _say("Two tables without code: each type is what every byte of the files says")
        _casparian("scan")
        for words in FAMILIES:
            _casparian("table", "add", *words, "--yes")
        _say(
            "The plugins that read the rest: each one locked, signed, and with its own environment"
        )
        for plugin in PLUGINS:
            _casparian("publish", plugin)
        _run_daemon(home)
        _say("The files: the edited one has two versions, the touched one still has one")
        _casparian("versions", f"{INBOX}/{EDITED}")
        _casparian("versions", f"{INBOX}/{TOUCHED}")
        _casparian("jobs")
        _casparian("topics")
        _show_tables()
        settings = config.load(str(home / config.FILE_NAME))
        _prove(settings)
    context.say(f"All checks passed, in {time.monotonic() - began:.0f} s. The files are in {home}")
    _look_further(home)


def _say(words: str) -> None:
    context.say(f"== {words}")


def _casparian(*words: str) -> None:
    """Print a command and run it.

    Raises:
        CasparianError: it ended with an error.
    """
    from casparian_flow import config
    from casparian_flow.cli import app

    shown = shlex.join(["casparian", *words])
    context.say(f"$ {shown}")
    arguments = ["--config", config.FILE_NAME, *words]
    if code := app(arguments, prog_name="casparian", standalone_mode=False):
        raise CasparianError(f"{shown} ended with {code}, in {Path.cwd()}", "read its output above")
    context.say("")


def _run_daemon(home: Path) -> None:
    """Run a daemon, and change two files meanwhile."""
    import asyncio

    from casparian_flow import config

    _say("The daemon, and two changed files")
    context.say(f"$ casparian start --workers {WORKERS}    (here, in this process)")
    settings = config.load(str(home / config.FILE_NAME))
    with context.line(chatty=True) as line:
        asyncio.run(_watch_and_edit(settings, home, line))
    context.say("the daemon has stopped\n")


async def _watch_and_edit(settings: Settings, home: Path, line: Line) -> None:
    from casparian_flow import main

    async with main.running(settings, "casparian demo", workers=WORKERS, watch=True) as daemon:
        await _until_idle(daemon, line)
        context.say(f"editing {EDITED} in place: order 1004 gets its missing field")
        edit(home)
        context.say(f"touching {TOUCHED}: new timestamps, same content\n")
        touch(home)
        await _until_idle(daemon, line)


async def _until_idle(daemon: Daemon, line: Line) -> None:
    import asyncio

    progress = asyncio.create_task(_show_progress(daemon, line))
    try:
        await asyncio.to_thread(_casparian, "wait", "--idle", "--timeout", str(PATIENCE_SECONDS))
    finally:
        progress.cancel()


async def _show_progress(daemon: Daemon, line: Line) -> None:
    import asyncio

    from casparian_flow.db import jobs

    while True:
        counts = await daemon.ledger.read_soon(jobs.counts)
        line.show(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
        await asyncio.sleep(TICK_SECONDS)


def _show_tables() -> None:
    from importlib.util import find_spec

    if not find_spec("duckdb"):
        context.note("(to see the tables: pip install 'casparian-flow[query]')")
        return
    _say("The tables: rows of each file's latest version")
    for question in TABLES:
        _casparian("query", question, "--limit", "3")
    _say("The rejects: what could not become a row, with line, reason and text")
    for question in REJECTS:
        _casparian("query", question)


def _prove(settings: Settings) -> None:
    from casparian_flow.db.access import open_ledger

    _say("One row, traced back to the file's content")
    with open_ledger(settings.database) as ledger:
        if broken := broken_promises(ledger):
            raise CasparianError(
                "\n  ".join(["the demo's results are not as expected:", *broken]),
                "casparian jobs show ID",
            )
        context.facts(trace(ledger))
        context.say("")
    _say("A check of the whole ledger")
    _casparian("verify")


def _look_further(home: Path) -> None:
    """Print commands to paste; they work even if `casparian` is not on the PATH."""
    program = Path(sys.argv[0])
    command = str(program.absolute()) if program.name == "casparian" else "casparian"
    context.say(f"  cd {shlex.quote(str(home))}")
    for words in (
        "status",
        "table show sales",
        "jobs show 1",
        'query "select * from delimited_history"',
        "verify --json",
        "start          (and edit a file in inbox meanwhile)",
    ):
        context.say(f"  {shlex.quote(command)} {words}")


# The sample files, the edit, and the checks.


INBOX = "inbox"
EDITED = "orders.csv"
TOUCHED = "stations.tsv"

SETTLE_SECONDS = 0.2
"""Settle time of the demo's source root; no other program writes there."""

_SHORT = b"77;59,95\r\n"
_MENDED = b"77;59,95;04.02.2025\r\n"
_ROW = ("Auftrag", "1004")
"""The order that the edit fixes: a reject of the first version, a row of the second."""

_PACKAGE = Path(__file__).parents[1]
PLUGINS = ("delimited", "excel_sheets", "json_records")
"""The bundled plugins that the demo files need."""


def prepare(folder: str | None) -> Path:
    """Make a directory with the demo files in its inbox; returns its absolute path.

    Args:
        folder: a new or empty directory; None makes a temporary one.

    Raises:
        CasparianError: the directory is not empty, or cannot be written.
    """
    import tempfile

    home = Path(os.path.realpath(folder or tempfile.mkdtemp(prefix="casparian-demo-")))
    try:
        if home.exists() and any(home.iterdir()):
            raise CasparianError(
                f"{home} is not empty", "casparian demo   (makes a temporary directory)"
            )
        # Not copytree: it copies modes, and the files of an installed package may be read-only.
        (home / INBOX).mkdir(parents=True)
        for file in sorted((_PACKAGE / "demo_files").iterdir()):
            if file.suffix != ".md":
                shutil.copyfile(file, home / INBOX / file.name)
    except OSError as error:
        raise CasparianError(
            f"cannot use {home}: {error.strerror}",
            "choose an empty directory that you can write to",
        ) from error
    return home


def edit(home: Path) -> None:
    """Add the missing field to an order, in place."""
    with (home / INBOX / EDITED).open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.replace(_SHORT, _MENDED))


def touch(home: Path) -> None:
    """Change a file's timestamps but not its content."""
    os.utime(home / INBOX / TOUCHED)


def broken_promises(ledger: Ledger) -> list[str]:
    """Results that are not as expected."""
    from casparian_flow.db import views

    found = [
        f"job {job['id']} ({job['rel_path']}) is {job['status']}: {job['reason']}"
        for job in ledger.read(lambda c: views.jobs(c, None))
        if job["status"] != "COMPLETED"
    ]
    versions = {row["rel_path"]: row["versions"] for row in _files(ledger)}
    for name in sorted(versions):
        wanted = 2 if name == EDITED else 1
        if versions[name] != wanted:
            found.append(f"{name} has {counted(versions[name], 'version')} instead of {wanted}")
    return found


def _files(ledger: Ledger) -> list[Row]:
    from casparian_flow.db import views

    return ledger.read(lambda c: views.files(c, None))


def trace(ledger: Ledger) -> dict[str, Any]:
    """Trace one row: read it from its Parquet file, look up its job, and hash the file again.

    Raises:
        CasparianError: the row, the ledger and the file differ.
    """
    import pyarrow.parquet as pq

    from casparian_flow.db import views

    newest = ledger.read(lambda c: views.jobs(c, 1, path=EDITED))[0]
    job: Any = ledger.read(lambda c: views.job(c, newest["id"]))
    plugin = next(
        row
        for row in ledger.read(views.plugins)
        if (row["name"], row["version"]) == (job["plugin"], job["plugin_version"])
    )
    output = next(o for o in job["outputs"] if o["topic"] == "delimited")
    rows = pq.ParquetFile(output["target"]).read().to_pylist()
    number, row = next((n, r) for n, r in enumerate(rows, 1) if r[_ROW[0]] == _ROW[1])
    path = Path(job["root"]) / job["rel_path"]
    import hashlib

    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    links = {
        "_cf_file_version_id": job["version_id"],
        "_cf_job_id": job["id"],
        "_cf_source_hash": job["content_hash"],
        "_cf_plugin_version": job["plugin_version"],
    }
    for name, value in links.items():
        if row[name] != value:
            raise CasparianError(f"{name} is {row[name]} in the row and {value} in the ledger")
    if hashed != job["content_hash"]:
        raise CasparianError(f"{path} has the hash {hashed}, not {job['content_hash']}")
    return {
        "output file": output["target"],
        "row": f"{number} of {len(rows)}",
        **row,
        "location": f"{job['source']}/{job['rel_path']}",
        "version": f"{job['version']} of that location, {job['size_bytes']} bytes, "
        f"seen {job['detected_at']}",
        "job": f"{job['id']}, {job['status']}, attempt {job['fence']}",
        "plugin": f"{job['plugin']} {job['plugin_version']}, artifact sha256 {job['artifact']}",
        "signed by key": plugin["key_id"],
        "hash in row": row["_cf_source_hash"],
        "hash in ledger": job["content_hash"],
        "hash on disk": f"{hashed}   (computed just now: equal)",
    }
