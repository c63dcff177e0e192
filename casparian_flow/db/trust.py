"""The trust log's rows: read whole and replayed each time, appended with an audit row each."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from sqlalchemy import Connection, insert, select, text

from casparian_flow.db import audit
from casparian_flow.db.models import LedgerIdentity, TrustStatement
from casparian_flow.security.signing import KINDS, Link, Row
from casparian_flow.security.trust import Trust, replay

# As bytes: what somebody wrote into a row need not be text, and must be refused in words.
_ROWS = text(
    """
    SELECT seq, CAST(kind AS BLOB) AS kind, CAST(payload AS BLOB), CAST(public_key AS BLOB),
           CAST(signature AS BLOB), CAST(countersignature AS BLOB)
    FROM cf_trust_statement ORDER BY seq
    """
)
_AUDITED = text(
    # The words of the index ix_cf_audit_trust, which knows these few rows among all commits.
    """
    SELECT CAST(detail AS BLOB) FROM cf_audit
    WHERE action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable') ORDER BY seq
    """
)


def ledger_id(connection: Connection) -> str:
    """What tells this ledger from every other: 32 hexadecimal digits."""
    return connection.execute(select(LedgerIdentity.id)).scalars().first() or ""


def read(connection: Connection) -> Trust:
    """What the trust log says now; where a row of it does not hold, that, and nothing else."""
    rows = tuple(
        Row(seq, kind.decode("ascii", "backslashreplace"), *parts)
        for seq, kind, *parts in connection.execute(_ROWS)
    )
    audited = tuple(map(_digest, connection.execute(_AUDITED).scalars()))
    return replay(ledger_id(connection), rows, audited)


def append(connection: Connection, row: Row, actor: str) -> Trust:
    """Add a row in the caller's writing transaction, with its audit row; what the log says then.

    Raises:
        AuthError: the row does not hold after those before it, or they do not.
    """
    before = read(connection)
    after = before.after(row)
    connection.execute(insert(TrustStatement).values(row._asdict()))
    statement = msgspec.json.decode(row.payload, type=KINDS[row.kind])
    detail = {"sha256": row.digest, "signer": statement.signer_key_id, **_said(statement)}
    audit.append(connection, actor, [audit.Event(row.kind, statement.subject, detail)])
    return after


def _digest(detail: bytes) -> str:
    """What an audit row says of a row of the log."""
    try:
        return str(json.loads(detail)["sha256"])
    except (ValueError, KeyError, TypeError):
        return ""


def _said(statement: Link) -> dict[str, Any]:
    """What a statement says besides its place in the log."""
    fields = msgspec.to_builtins(statement)
    return {name: value for name, value in fields.items() if name not in Link.__struct_fields__}
