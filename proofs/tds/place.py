"""A table of SQL Server for the tests that hold every sink to one contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from casparian_flow.config import DatabaseSettings, MssqlSettings
from proofs.tds.server import Server
from proofs.tds.session import USER
from proofs.tds.tables import Database
from tests.sinks.stages import TOPIC, Place

PAUSE_SECONDS = 0.02
"""How long who polls waits for the next commit at the most."""


class ServerPlace(Place):
    """A table a topic, in the double; opened anew each time, as the Committer does.

    Args:
        server: the double.
        home: a folder of its own, for staged files.
        user: who logs in.
    """

    def __init__(self, server: Server, home: Path, user: str = USER) -> None:
        self.scheme = "mssql"
        self.home = home
        self._commits = -1
        self.server = server
        self.settings = DatabaseSettings(
            db_location=str(home / "casparian_flow.sqlite3"),
            mssql=MssqlSettings(connection=server.connection_string.replace(USER, user)),
        )

    @property
    def tables(self) -> Database:
        """What the server has."""
        return self.server.database

    def location_of(self, topic: str) -> str:
        """A table belongs to one topic."""
        return f"mssql://[{topic.replace(']', ']]')}]"

    def rows(self, topic: str = TOPIC) -> list[dict[str, Any]]:
        # Who polls is told of every commit, and else leaves the server's threads, in this process,
        # the time they need.
        self._commits = self.tables.wait(self._commits, PAUSE_SECONDS)
        table = self.tables.committed(topic)
        if table is None:
            return []
        names = [column.name for column in table.columns]
        return [dict(zip(names, row, strict=True)) for row in table.rows]

    def intrude(self) -> None:
        writer = self.tables.begin()
        table = self.tables.read(writer, TOPIC)
        theirs = tuple(0 if column.name == "id" else None for column in table.columns)
        self.tables.write(writer, TOPIC, table.with_rows((*table.rows, theirs)))
        self.tables.commit(writer)
