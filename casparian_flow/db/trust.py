"""The trust log: which keys this ledger trusts with which plugins.

Its rows are read whole and replayed each time. Each change is a signed statement: a row of the log,
with its row of the audit. People make them in `services.keys`.
"""

from __future__ import annotations

import json
import socket
from typing import Any

import msgspec

from casparian_flow.db import audit, visibility
from casparian_flow.db.audit import Event
from casparian_flow.db.connection import Connection, execute
from casparian_flow.security.signing import KINDS, Link, Row
from casparian_flow.security.trust import Trust, replay

# As bytes: what somebody wrote into a row need not be text, and must be refused in words.
_ROWS = """
    SELECT seq, CAST(kind AS BLOB) AS kind, CAST(payload AS BLOB), CAST(public_key AS BLOB),
           CAST(signature AS BLOB), CAST(countersignature AS BLOB)
    FROM cf_trust_statement ORDER BY seq
    """
_AUDITED = (
    # The words of the index ix_cf_audit_trust, which knows these few rows among all commits.
    """
    SELECT CAST(detail AS BLOB) FROM cf_audit
    WHERE action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable') ORDER BY seq
    """
)


def ledger_id(connection: Connection) -> str:
    """What tells this ledger from every other: 32 hexadecimal digits."""
    return connection.execute("SELECT id FROM cf_ledger_identity").scalar() or ""


def read(connection: Connection) -> Trust:
    """What the trust log says now; where a row of it does not hold, that, and nothing else."""
    rows = tuple(
        Row(seq, kind.decode("ascii", "backslashreplace"), *parts)
        for seq, kind, *parts in connection.execute(_ROWS)
    )
    audited = tuple(map(_digest, connection.execute(_AUDITED).scalars()))
    return replay(ledger_id(connection), rows, audited)


def append(connection: Connection, before: Trust, row: Row) -> tuple[Trust, Event]:
    """Add a row to the log, in the caller's writing transaction.

    Args:
        before: what the log says now.

    Returns:
        What the log says then; and the row's event, which the caller must write to the audit in
        the same transaction: without it the log does not hold.

    Raises:
        AuthError: the row does not hold after those before it, or they do not.
    """
    after = before.after(row)
    execute(
        connection,
        "INSERT INTO cf_trust_statement "
        "(seq, kind, payload, public_key, signature, countersignature) "
        "VALUES (:seq, :kind, :payload, :public_key, :signature, :countersignature)",
        **row._asdict(),
    )
    statement = msgspec.json.decode(row.payload, type=KINDS[row.kind])
    detail = {"sha256": row.digest, "signer": statement.signer_key_id, **_fields(statement)}
    return after, Event(row.kind, statement.subject, detail)


def _digest(detail: bytes) -> str:
    """What an audit row says of a row of the log."""
    try:
        return str(json.loads(detail)["sha256"])
    except (ValueError, KeyError, TypeError):
        return ""


def _fields(statement: Link) -> dict[str, Any]:
    """A statement without its place in the log."""
    fields = msgspec.to_builtins(statement)
    return {name: value for name, value in fields.items() if name not in Link.__struct_fields__}


def deactivate(connection: Connection, trusted: Trust) -> list[str]:
    """Route nothing more to active versions that may not run by now; those, as `name version`."""
    rows = connection.execute(
        "SELECT p.name, p.version, p.publisher FROM cf_plugin p JOIN cf_plugin_config c "
        "ON c.plugin_name = p.name AND c.active_version = p.version"
    ).all()
    barred = [row for row in rows if trusted.barred(row.publisher, row.name, row.version)]
    names = [row.name for row in barred]
    statement = """
        UPDATE cf_plugin_config SET active_version = NULL
        WHERE plugin_name IN (SELECT value FROM json_each(:names))
        """
    execute(connection, statement, names=names)
    for name in dict.fromkeys(names):
        visibility.refresh(connection, visibility.Scope(plugin=name))
    return [f"{row.name} {row.version}" for row in barred]


def person() -> str:
    """This process's user and host: the owner of a key that nobody else has named."""
    return f"{audit.actor()}@{socket.gethostname()}"
