"""A table of SQL Server for the tests that hold every sink to one contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from casparian_flow.config import DatabaseSettings, MssqlSettings
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.sql import LEDGER, ROWS
from casparian_flow.errors import ConfigError
from casparian_flow.protocol import Output
from proofs.tds.queries import rows_of
from proofs.tds.server import Server
from proofs.tds.session import USER
from proofs.tds.tables import Database
from tests.sinks.stages import TOPIC, Place

Rows = tuple[tuple[Any, ...], ...]

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
        """A table belongs to one topic; a topic that can have none gets another's."""
        location = f"mssql://[{topic.replace(']', ']]')}]"
        try:
            table_of(location)
        except ConfigError:
            return f"mssql://{TOPIC}"
        return location

    def rows(self, topic: str = TOPIC) -> list[dict[str, Any]]:
        # Who polls is told of every commit, and else leaves the server's threads, in this process,
        # the time they need.
        self._commits = self.tables.wait(self._commits, PAUSE_SECONDS)
        return rows_of(self.tables, topic)

    def intrude(self) -> None:
        columns = self.tables.read(self.tables.snapshot(), ROWS + TOPIC).columns
        zero = {"id", "_cf_output"}
        theirs = tuple(0 if column.name in zero else None for column in columns)
        self._rewrite(TOPIC, lambda rows: (*rows, theirs))

    def damage(self, output: Output) -> None:
        ids = {record["output_key"]: record["id"] for record in rows_of(self.tables, LEDGER)}
        number = ids[output.output_key]

        def without(rows: Rows) -> Rows:
            gone = next(n for n, row in enumerate(rows) if row[0] == number)
            return rows[:gone] + rows[gone + 1 :]

        self._rewrite(output.topic, without)

    def _rewrite(self, topic: str, change: Callable[[Rows], Rows]) -> None:
        """Give the table of a topic's rows others."""
        writer, name = self.tables.begin(), ROWS + topic
        table = self.tables.read(writer, name)
        self.tables.write(writer, name, table.with_rows(change(table.rows)))
        self.tables.commit(writer)
