"""A real SQL Server for the tests that hold every sink to one contract, where there is one.

    CASPARIAN_TEST_MSSQL='Server=...;Database=...;UID=...;PWD={...}' python -m pytest tests/sinks

Each test has a schema of its own, so that none meets what another published; the login must be
allowed to make schemas and tables. Nothing here has ever met a real server: docs/sinks_mssql.md.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from casparian_flow.config import DatabaseSettings, MssqlSettings
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.mssql_session import Session
from casparian_flow.engine.sinks.mssql_tables import MssqlSchema, qualified, quote
from casparian_flow.engine.sinks.sql import LEDGER, ROWS
from casparian_flow.errors import ConfigError
from casparian_flow.protocol import Output
from tests.sinks.stages import TOPIC, Place

CONNECTION = os.environ.get("CASPARIAN_TEST_MSSQL", "")
"""Empty: there is none."""


class RealPlace(Place):
    """A table a topic, in a schema that is made for the test.

    Args:
        connection: an ODBC connection string.
        home: a folder of its own, for staged files.
    """

    def __init__(self, connection: str, home: Path) -> None:
        self.scheme = "mssql"
        self.home = home
        self.schema = f"casparian_test_{secrets.token_hex(8)}"
        self.settings = DatabaseSettings(
            db_location=str(home / "casparian_flow.sqlite3"),
            mssql=MssqlSettings(connection=connection),
        )

    def location_of(self, topic: str) -> str:
        """A table belongs to one topic; a topic that can have none gets another's."""
        location = f"mssql://{self.schema}.[{topic.replace(']', ']]')}]"
        try:
            table_of(location)
        except ConfigError:
            return f"mssql://{self.schema}.{TOPIC}"
        return location

    def rows(self, topic: str = TOPIC) -> list[dict[str, Any]]:
        view = qualified(self.schema, topic)
        with self._session() as session:
            names = [*MssqlSchema(session, self.schema).columns(topic)]
            if not names:
                return []
            listed = ", ".join(map(quote, names))
            found = session.ask(f"SELECT {listed} FROM {view}")
        return [dict(zip(names, row, strict=True)) for row in found]

    def intrude(self) -> None:
        """Put a row into the topic's table that is not ours."""
        table = qualified(self.schema, ROWS + TOPIC)
        with self._session() as session, session.transaction():
            session.send(f"INSERT INTO {table} (_cf_output, [id]) VALUES (0, 0)")

    def damage(self, output: Output) -> None:
        table = qualified(self.schema, ROWS + output.topic)
        ledger = qualified(self.schema, LEDGER)
        number = f"(SELECT id FROM {ledger} WHERE output_key = ?)"
        deleted = f"DELETE TOP (1) FROM {table} WHERE _cf_output = {number}"
        with self._session() as session, session.transaction():
            session.send(deleted, output.output_key)

    @contextlib.contextmanager
    def there(self) -> Iterator[RealPlace]:
        """The schema, while the block runs."""
        with self._session() as session, session.transaction():
            session.send(f"CREATE SCHEMA [{self.schema}]")
        try:
            yield self
        finally:
            made = "SELECT o.type, o.name FROM sys.objects AS o WHERE o.schema_id = SCHEMA_ID(?)"
            with self._session() as session, session.transaction():
                for kind, name in session.ask(made, self.schema):
                    if what := {"U": "TABLE", "V": "VIEW"}.get(kind.strip()):
                        session.send(f"DROP {what} {qualified(self.schema, name)}")
                session.send(f"DROP SCHEMA [{self.schema}]")

    def _session(self) -> contextlib.closing[Session]:
        return contextlib.closing(Session(self.settings.mssql))
