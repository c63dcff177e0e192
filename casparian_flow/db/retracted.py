"""Which outputs a person takes back: chosen, decided in one transaction, and settled when their
sinks have done it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, text, update

from casparian_flow.db.models import RetractedOutput, Retraction
from casparian_flow.db.outputs import NAMED


def of_version(connection: Connection, version_id: int) -> list[Any]:
    """Everything that stands in the sinks of one version."""
    query = f"SELECT * FROM ({NAMED}) WHERE version_id = :id ORDER BY output_key"  # noqa: S608
    return list(connection.execute(text(query), {"id": version_id}))


def of_location(connection: Connection, source: str, path: bytes, rel_path: str) -> list[Any]:
    """Everything that stands in the sinks of all versions of one location.

    Args:
        path: as the filesystem has it.
        rel_path: as we show it, for names that are not UTF-8.
    """
    query = f"""
        SELECT * FROM ({NAMED}) WHERE source = :source AND (path = :path OR rel_path = :rel_path)
        ORDER BY output_key
        """  # noqa: S608
    given = {"source": source, "path": path, "rel_path": rel_path}
    return list(connection.execute(text(query), given))


def at_work(connection: Connection, output_keys: Sequence[str]) -> int | None:
    """A job of one of the locations of these outputs that runs or is being published; None: none
    is."""
    return connection.execute(
        text(
            f"""
            SELECT min(j.id) FROM cf_processing_queue j
            JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_file_location l ON l.id = v.location_id
            JOIN cf_source_root r ON r.id = l.source_root_id
            WHERE j.status IN ('RUNNING', 'COMMITTING') AND (r.name, l.path) IN
                (SELECT source, path FROM ({NAMED}) WHERE output_key IN :keys)
            """  # noqa: S608
        ).bindparams(bindparam("keys", expanding=True)),
        {"keys": list(output_keys)},
    ).scalar()


def retracting(connection: Connection, keys: Sequence[str]) -> None:
    """Decide that nobody is to see these outputs; their sinks are asked next."""
    rows = [{"output_key": key, "state": Retraction.RETRACTING} for key in keys]
    connection.execute(insert(RetractedOutput), rows)


def reinstating(connection: Connection, keys: Sequence[str]) -> None:
    """Decide that these outputs are to be seen again; their sinks are asked next."""
    connection.execute(
        update(RetractedOutput)
        .where(RetractedOutput.output_key.in_(keys))
        .values(state=Retraction.REINSTATING)
    )


def pending(connection: Connection) -> list[Any]:
    """Outputs whose sinks may not have been asked yet, with what is to be done."""
    query = f"""
        SELECT n.*, t.state FROM ({NAMED}) n JOIN cf_retracted_output t USING (output_key)
        WHERE t.state <> 'RETRACTED' ORDER BY output_key
        """  # noqa: S608
    return list(connection.execute(text(query)))


def settle(connection: Connection, key: str) -> None:
    """Write down that the sink has done what was decided about an output."""
    this = RetractedOutput.output_key == key
    connection.execute(
        delete(RetractedOutput).where(this, RetractedOutput.state == Retraction.REINSTATING)
    )
    connection.execute(update(RetractedOutput).where(this).values(state=Retraction.RETRACTED))
