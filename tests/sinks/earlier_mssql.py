"""Tables of SQL Server as earlier releases left them, made with the statements that those sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec

from casparian_flow.config import DatabaseSettings
from casparian_flow.engine.sinks.base import facts_in, lineage_of
from casparian_flow.engine.sinks.mssql_session import Session
from casparian_flow.protocol import Output, State

_LEDGER = """
CREATE TABLE [dbo]._cf_outputs (
	output_key CHAR(64) COLLATE Latin1_General_BIN2 NOT NULL,
	table_name NVARCHAR(128) NOT NULL,
	topic NVARCHAR(400) COLLATE Latin1_General_BIN2 NOT NULL,
	job_id BIGINT NOT NULL,
	file_version_id BIGINT NOT NULL,
	source_hash NVARCHAR(64) NOT NULL,
	plugin_version NVARCHAR(255) NOT NULL,
	rows BIGINT NOT NULL,
	digest CHAR(64) NOT NULL,
	slot CHAR(64) COLLATE Latin1_General_BIN2 NOT NULL,
	ordinal INTEGER NOT NULL,
	mode NVARCHAR(10) NOT NULL,
	state NVARCHAR(10) NOT NULL,
	published_at DATETIME NOT NULL DEFAULT sysutcdatetime(),
	facts NVARCHAR(max) NOT NULL,
	PRIMARY KEY (output_key)
)"""

_LINEAGE = (
    "[_cf_file_version_id] bigint NULL, [_cf_job_id] bigint NULL, "
    "[_cf_source_hash] nvarchar(64) NULL, [_cf_plugin_version] nvarchar(255) NULL"
)


class Earlier:
    """A schema that an earlier release writes.

    Args:
        settings: the server.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self._settings = settings
        self.send(_LEDGER)

    def send(self, *statements: str) -> None:
        """Send statements, in one transaction."""
        with closing(Session(self._settings.mssql)) as session, session.transaction():
            for sql in statements:
                session.send(sql)

    def topic(self, name: str, columns: str) -> None:
        """Create the table of a topic and that of its retracted rows."""
        self.send(
            f"CREATE TABLE [dbo].[{name}] ({columns}, {_LINEAGE})",
            f"CREATE INDEX _cf_job ON [dbo].[{name}] ([_cf_job_id])",
            f"CREATE TABLE [dbo].[_cf_retracted_{name}] ({columns}, {_LINEAGE})",
        )

    def add(self, output: Output, rows: Sequence[Sequence[Any]], state: str = "shown") -> Output:
        """Write an output: `shown`, `replaced` (its rows are deleted) or `retracted`."""
        topic = output.topic
        record = {
            "output_key": output.output_key, "table_name": topic, "topic": topic,
            "job_id": output.job_id, "file_version_id": output.version_id,
            "source_hash": output.content_hash, "plugin_version": output.plugin_version,
            "rows": len(rows), "digest": "d" * 64, "slot": output.location_slot,
            "ordinal": output.ordinal, "mode": output.mode, "state": state,
            "facts": json.dumps(facts_in(output)),
        }  # fmt: skip
        table = {"shown": topic, "retracted": f"_cf_retracted_{topic}"}.get(state)
        with closing(Session(self._settings.mssql)) as session, session.transaction():
            marks = ", ".join("?" * len(record))
            insert = f"INSERT INTO [dbo]._cf_outputs ({', '.join(record)}) VALUES ({marks})"
            session.send(insert, *record.values())
            for row in rows if table else ():
                values = ", ".join(map(_literal, [*row, *lineage_of(output)]))
                session.send(f"INSERT INTO [dbo].[{table}] ({LISTED}) VALUES ({values})")
        states = {"shown": State.CURRENT, "retracted": State.RETRACTED}
        return msgspec.structs.replace(
            output, rows=len(rows), digest="d" * 64, target=f"mssql://dbo.{topic}",
            state=states.get(state, State.HIDDEN),
        )  # fmt: skip


def _literal(value: int | str | None) -> str:
    return "NULL" if value is None else f"N'{value}'" if isinstance(value, str) else str(value)


LISTED = "id, name, _cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version"
"""The columns of every topic here."""

COLUMNS = "[id] bigint NULL, [name] nvarchar(max) NULL"
