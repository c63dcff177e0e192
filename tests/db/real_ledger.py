"""A small ledger that came about by work: files found, jobs of every end, a few still waiting."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from casparian_flow.config import Settings
from casparian_flow.db import audit, integrity, jobs, schema, seals
from casparian_flow.db.access import Connection, open_ledger
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services.scan import scan
from tests.conftest import take_bytes_away, write_config
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import BEHAVES, publish


def worked(folder: Path) -> Settings:
    """A ledger with versions, attempts, outputs, and jobs of every lasting status."""
    settings = write_config(folder / "flow")
    source = folder / "source"
    source.mkdir()
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
        for what in ("fine", "also fine", "raise", "undeclared", "edited", "aborted"):
            (source / f"{what}.do").write_text(what)
        queued = scan(ledger, root).job_ids
        (source / "edited.do").write_text("as it is now")
        take_bytes_away(settings)
        job_verbs.abort(ledger, queued[-1:])
        work_off(settings, workers=1)
        (source / "waiting.do").write_text("waits")
        scan(ledger, root)
        found = ledger.read(jobs.counts)
    ends = ("COMPLETED", "FAILED", "ABORTED", "SUPERSEDED", "QUEUED")
    assert found.keys() == set(ends), found
    return settings


def before(patch: pytest.MonkeyPatch, number: str) -> None:
    """Have ledgers be as they were before a migration, which came before the setup was sealed."""
    scripts = schema._scripts()
    patch.setattr(schema, "_scripts", lambda: [s for s in scripts if s[0] < number])
    patch.setattr(seals, "SETUP_TABLES", ())
    patch.setattr(seals, "_blocks", lambda connection, which: {})


def said(connection: Connection) -> list[str]:
    """All that `verify` says of the ledger itself."""
    return [
        *integrity.broken_invariants(connection),
        *audit.problems(connection),
        *integrity.seal_problems(connection),
    ]


@contextmanager
def attacker(settings: Settings) -> Iterator[sqlite3.Connection]:
    """Who can write the file: no constraints, no gate, and no triggers of ours until the end."""
    with closing(sqlite3.connect(settings.database.path, isolation_level=None)) as connection:
        triggers = _disarm(connection)
        yield connection
        for sql in triggers:
            with suppress(sqlite3.OperationalError):  # its table is no table now
                connection.execute(sql)


def _disarm(connection: sqlite3.Connection) -> list[str]:
    """Drop all triggers; the statements that made them."""
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("PRAGMA ignore_check_constraints = ON")
    triggers = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
    ).fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    return [sql for _, sql in triggers]


class Altered:
    """A ledger that is altered and asked, again and again; each change is taken back."""

    def __init__(self, settings: Settings) -> None:
        self._raw = schema.connect(settings.database)
        _disarm(self._raw)

    def close(self) -> None:
        self._raw.close()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._raw.execute(query).fetchall()

    def after(
        self, *statements: str | tuple[str, tuple[Any, ...]], replayed: bool = True
    ) -> list[str]:
        """What is said after these, of the audit's chain and of the rows it has."""
        connection = Connection(self._raw)
        self._raw.execute("BEGIN")
        for statement in statements:
            query, values = (statement, ()) if isinstance(statement, str) else statement
            self._raw.execute(query, values)
        found = list(audit.problems(connection))
        if replayed:
            found += integrity.seal_problems(connection)
        self._raw.rollback()
        return found
