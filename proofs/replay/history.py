"""A real revision history, replayed into a watched root and compared with the ledger.

The events file is the oracle. Waiting until idle after each commit, the ledger must hold exactly
one version for each path and consecutive distinct content; flooding, every recorded version must
be a content the path has had, and every path's last content must be recorded. A commit that
removes hundreds of files at once may have its deletions held, and must then lose nothing else.
"""

from __future__ import annotations

import csv
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select

from casparian_flow.db import jobs
from casparian_flow.db import versions as db_versions
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileLocation, FileVersion
from casparian_flow.services.idle import wait_until_idle
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.verify import verify
from proofs.replay.tables import Tables
from proofs.replay.upsets import Upsets
from tests.conftest import write_config
from tests.daemons import started
from tests.factories import add_root
from tests.plugs import publish_file
from tests.real_data import REPOSITORY, real_data

HISTORIES = real_data("histories") or Path("shared/data/histories")
IDLE_SECONDS = 300.0


class Event(NamedTuple):
    """One change of one path in one commit."""

    seq: int
    status: str
    path: str
    sha256: str


def events(name: str, commits: int | None) -> list[Event]:
    """The events of a history, up to a number of commits."""
    with open(HISTORIES / f"{name}.events.csv", newline="") as file:
        rows = [
            Event(int(r["seq"]), r["status"], r["path"], r["sha256"]) for r in csv.DictReader(file)
        ]
    return [event for event in rows if commits is None or event.seq <= commits]


def apply(burst: Sequence[Event], blobs: Path, root: Path) -> None:
    """Write, replace and remove files, each content by temporary file and rename."""
    for event in burst:
        target = root / event.path
        if event.status == "D":
            target.unlink()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.copyfile(blobs / event.sha256, temporary)
        temporary.replace(target)


def recorded(ledger: Ledger) -> tuple[dict[str, list[str]], set[str]]:
    """Path -> hashes of its versions in order; and the paths that are there now."""
    query = (
        select(FileLocation.rel_path, FileVersion.content_hash, FileLocation.gone_at)
        .join(FileVersion, FileVersion.location_id == FileLocation.id)
        .order_by(FileLocation.rel_path, FileVersion.ordinal)
    )
    versions: dict[str, list[str]] = defaultdict(list)
    present = set()
    for path, content, gone_at in ledger.read(lambda c: c.execute(query).all()):
        versions[path].append(content)
        if gone_at is None:
            present.add(path)
    return versions, present


def problems(ledger: Ledger, root: Root, history: Sequence[Event], flood: bool) -> list[str]:
    """How the ledger differs from the oracle; empty where it does not.

    Deletions that the daemon holds are said to be right, as a person would.
    """
    contents: dict[str, list[str]] = defaultdict(list)
    last: dict[str, str] = {}
    for event in history:
        last[event.path] = "" if event.status == "D" else event.sha256
        if event.status != "D" and contents[event.path][-1:] != [event.sha256]:
            contents[event.path].append(event.sha256)
    held = ledger.read(lambda c: db_versions.scan_state(c, root.id)).held
    believed = scan(ledger, root, believe=True)
    versions, present = recorded(ledger)
    found = []
    if believed.gone != held or believed.versions:
        found.append(f"{held} deletions were held, but a last scan found {believed}")
    if present != {path for path, content in last.items() if content}:
        found.append("the files that are there are not those of the last commit")
    if not flood:
        wrong = [
            path for path in contents.keys() | versions.keys() if contents[path] != versions[path]
        ]
        return [*found, *(f"{path}: versions differ from the history" for path in wrong)]
    for path, hashes in versions.items():
        if not set(hashes) <= set(contents[path]):
            found.append(f"{path}: a version that is no content of its history")
    for path, content in last.items():
        if content and versions[path][-1:] != [content]:
            found.append(f"{path}: its last content is not recorded")
    return found


class Way(NamedTuple):
    """How a history is replayed."""

    commits: int | None = None
    """So many; None for all."""
    flood: bool = False
    modes: Sequence[str] = ()
    """Each topic goes to sinks of its own in each of these."""
    kinds: Sequence[str] = ("sqlite", "parquet")
    kills: int = 0
    seed: int = 0


def replay(folder: Path, name: str, way: Way) -> dict[str, Any]:
    """Run a history in `folder`; the figures of the run.

    Raises:
        AssertionError: ledger or tables differ from the oracle, or a job is unfinished.
    """
    history = events(name, way.commits)
    bursts = [list(burst) for _, burst in groupby(history, key=lambda event: event.seq)]
    blobs = folder / "blobs"
    with tarfile.open(HISTORIES / f"{name}.blobs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    upsets = Upsets(folder, way.kills, len(bursts), way.seed) if way.kills else None
    settings = upsets.place.settings if upsets else write_config(folder / "flow")
    files = folder / "root"
    files.mkdir()
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, files)
        publish_file(ledger, settings, REPOSITORY / "plugins" / "delimited.py", "1.0.0")
        tables = [Tables(ledger, settings, mode, way.kinds, blobs) for mode in way.modes]
        for each in tables:
            each.place_topics()
        with upsets.running() if upsets else started(settings):
            for number, burst in enumerate(bursts):
                apply(burst, blobs, files)
                if upsets:
                    upsets.strike(number)
                if way.flood and number < len(bursts) - 1:
                    continue
                wait_until_idle(settings, ledger, IDLE_SECONDS)
                wrong = [words for each in tables for words in each.look(number, len(bursts))]
                assert not wrong, "\n".join([f"after commit {number + 1}:", *wrong[:20]])
        found = problems(ledger, root, history, way.flood)
        if tables:
            found += verify(settings, ledger).problems
        assert not found, "\n".join(found[:20])
        counts = ledger.read(jobs.counts)
        assert not counts.keys() & set(jobs.UNFINISHED), counts
        versions = sum(map(len, recorded(ledger)[0].values()))
    return {
        "events": len(history), "versions": versions, **counts,
        **{f"looks under {each.mode}": each.looks for each in tables},
        **({f"killed {who}": n for who, n in upsets.killed.items()} if upsets else {}),
    }  # fmt: skip
