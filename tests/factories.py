"""Rows in any state, for tests that begin in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import insert, update

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import audit, plugins, schema
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.models import (
    Directory,
    Epoch,
    FileLocation,
    FileVersion,
    Plugin,
    ProcessingJob,
    SourceRoot,
)
from casparian_flow.db.states import JobStatus
from casparian_flow.services.scan import Root

MANIFEST = (
    '{"name": "p", "version": "1", "patterns": [], "topics": [], "priority": 0,'
    ' "subscriptions": [], "sinks": {}, "timeout_seconds": 0}'
)
"""Of a plugin whose jobs can be given to a worker, and that cannot be run."""


@contextmanager
def undone(database: DatabaseSettings) -> Iterator[Connection]:
    """A writing transaction that is taken back."""
    with closing(schema.connect(database)) as raw:
        raw.begin_writing()
        yield Connection(raw)
        raw.rollback()


def add_audit_row(connection: Connection, subject: str = "something") -> None:
    """A row of the audit about nothing."""
    audit.append(connection, "me", [audit.Event("test", subject, {})])


def add_root(ledger: Ledger, path: Path, **columns: object) -> Root:
    """An active source root; settle 0 unless told otherwise."""
    values = {"path": str(path), "name": path.name, "settle_seconds": 0.0, **columns}
    values = {"active": True, "ignore": "", **values}

    def work(connection: Connection) -> Root:
        row = connection.execute(insert(SourceRoot).values(values).returning(SourceRoot)).one()
        return Root.of(row)

    return ledger.write(work)


def add_plugin(
    ledger: Ledger, name: str, version: str = "1.0.0", subscriptions: str | None = None
) -> int:
    """A deployed plugin (not a runnable one); with subscriptions it is active."""

    def work(connection: Connection) -> int:
        plugin_id = plugins.add(
            connection, name=name, version=version, source=b"", lock="", manifest="{}",
            artifact_hash=f"{name}-{version}", public_key=b"", signature=b"", publisher="",
        )  # fmt: skip
        if subscriptions is not None:
            plugins.subscribe(connection, name, [subscriptions], version)
        return plugin_id

    return ledger.write(work)


def add_job(ledger: Ledger, status: JobStatus = JobStatus.QUEUED, **columns: object) -> int:
    """A job in any state, with all it refers to."""

    def work(connection: Connection) -> int:
        number = connection.execute(insert(Epoch).values(pid=1, host="h").returning(Epoch.id))
        epoch = number.scalar_one()
        root = connection.execute(
            insert(SourceRoot)
            .values(path=f"/nowhere/{epoch}", name=f"root-{epoch}", active=True, ignore="")
            .returning(SourceRoot.id)
        ).scalar_one()
        folder = connection.execute(
            insert(Directory).values(source_root_id=root, path=b"").returning(Directory.id)
        ).scalar_one()
        location = connection.execute(
            insert(FileLocation)
            .values(source_root_id=root, directory_id=folder, path=b"f", rel_path="f")
            .returning(FileLocation.id)
        ).scalar_one()
        version = connection.execute(
            insert(FileVersion)
            .values(location_id=location, ordinal=1, content_hash="0" * 64, size_bytes=0)
            .returning(FileVersion.id)
        ).scalar_one()
        connection.execute(
            update(FileLocation)
            .where(FileLocation.id == location)
            .values(current_version_id=version)
        )
        plugin = connection.execute(
            insert(Plugin)
            .values(
                name=f"p{epoch}", version="1", source=b"", lock="", manifest=MANIFEST,
                artifact_hash=str(epoch), public_key=b"", signature=b"", publisher="",
            )
            .returning(Plugin.id)
        ).scalar_one()  # fmt: skip
        held = status == JobStatus.RUNNING
        values = {
            "file_version_id": version, "plugin_id": plugin, "plugin_name": f"p{epoch}",
            "status": status, "fence": 1, "attempts": 1, "worker": "w" if held else None,
            "epoch": epoch, **columns,
        }  # fmt: skip
        return connection.execute(
            insert(ProcessingJob).values(values).returning(ProcessingJob.id)
        ).scalar_one()

    return ledger.write(work)
