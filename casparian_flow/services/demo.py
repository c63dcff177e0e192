"""What `casparian demo` needs besides the commands it runs: files, an edit, and a proof."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from casparian_flow.db import views
from casparian_flow.db.access import Ledger
from casparian_flow.db.pages import Row
from casparian_flow.errors import CasparianError

INBOX = "inbox"
EDITED = "orders.csv"
TOUCHED = "stations.tsv"

SETTLE_SECONDS = 0.2
"""Of the demo's source root: its files are written by nobody but us."""

_SHORT = b"77;59,95\r\n"
_MENDED = b"77;59,95;04.02.2025\r\n"
_ROW = ("Auftrag", "1004")
"""The order that the edit mends: a reject of the first version, a row of the second."""

_PACKAGE = Path(__file__).parents[1]
PLUGINS = ("delimited", "excel_sheets", "json_records", "access_log")
"""The bundled plugins that the demo files need."""


def prepare(folder: str | None) -> Path:
    """A directory with copies of the demo files in its inbox; its absolute path.

    Args:
        folder: absent or empty; None makes a scratch directory.

    Raises:
        CasparianError: there is something in the directory, or it cannot be written.
    """
    home = Path(os.path.realpath(folder or tempfile.mkdtemp(prefix="casparian-demo-")))
    try:
        if home.exists() and any(home.iterdir()):
            raise CasparianError(
                f"{home} is not empty", "casparian demo   (makes a directory of its own)"
            )
        # Not copytree: an installed package may be read-only, and the edit must not be refused.
        (home / INBOX).mkdir(parents=True)
        for file in sorted((_PACKAGE / "demo_files").iterdir()):
            if file.suffix != ".md":
                shutil.copyfile(file, home / INBOX / file.name)
    except OSError as error:
        raise CasparianError(
            f"cannot use {home}: {error.strerror}", "name an empty directory of your own"
        ) from error
    return home


def edit(home: Path) -> None:
    """Mend, in place, the order that lacks a field."""
    with (home / INBOX / EDITED).open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.replace(_SHORT, _MENDED))


def touch(home: Path) -> None:
    """Give a file new times and leave its bytes alone."""
    os.utime(home / INBOX / TOUCHED)


def broken_promises(ledger: Ledger) -> list[str]:
    """What is not as the demo says, a sentence each."""
    found = [
        f"job {job['id']} ({job['rel_path']}) is {job['status']}: {job['reason']}"
        for job in ledger.read(lambda c: views.jobs(c, None))
        if job["status"] != "COMPLETED"
    ]
    versions = {row["rel_path"]: row["versions"] for row in _files(ledger)}
    for name in sorted(versions):
        wanted = 2 if name == EDITED else 1
        if versions[name] != wanted:
            found.append(f"{name} has {versions[name]} versions instead of {wanted}")
    return found


def _files(ledger: Ledger) -> list[Row]:
    return ledger.read(lambda c: views.files(c, None))


def trace(ledger: Ledger) -> dict[str, Any]:
    """One row, back to its bytes: read from its Parquet file, looked up, and hashed again.

    Raises:
        CasparianError: one of the links does not hold.
    """
    import pyarrow.parquet as pq

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
    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
    links = {
        "_cf_file_version_id": job["version_id"],
        "_cf_job_id": job["id"],
        "_cf_source_hash": job["content_hash"],
        "_cf_plugin_version": job["plugin_version"],
    }
    for name, value in links.items():
        if row[name] != value:
            raise CasparianError(f"the row says {name} {row[name]}, the ledger {value}")
    if hashed != job["content_hash"]:
        raise CasparianError(f"{path} hashes to {hashed}, not to {job['content_hash']}")
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
        "hash on disk": f"{hashed}   (hashlib, just now: equal)",
    }
