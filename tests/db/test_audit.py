"""The audit's chain: whole, and broken by any change."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, text

from casparian_flow.db import audit
from casparian_flow.db.access import Ledger


def problems(ledger: Ledger) -> list[str]:
    return ledger.read(lambda c: list(audit.problems(c)))


def tamper(ledger: Ledger, statement: str) -> None:
    def work(connection: Connection) -> None:
        connection.execute(text("DROP TRIGGER cf_audit_no_update"))
        connection.execute(text("DROP TRIGGER cf_audit_no_delete"))
        connection.execute(text(statement))

    ledger.write(work)


def fill(ledger: Ledger) -> None:
    for n in range(5):
        event = audit.Event("commit", f"job {n}", {"rows": n})
        ledger.write(lambda c, e=event: audit.append(c, "tester", [e, e]))


def test_a_chain_that_nobody_touched_is_whole(ledger: Ledger) -> None:
    fill(ledger)
    assert problems(ledger) == []


@pytest.mark.parametrize(
    "column", ["at", "actor", "action", "subject", "detail", "previous", "hash"]
)
def test_any_altered_column_is_named(ledger: Ledger, column: str) -> None:
    fill(ledger)
    tamper(ledger, f"UPDATE cf_audit SET {column} = {column} || 'x' WHERE seq = 4")
    assert "audit: row 4 was altered" in problems(ledger)


def test_a_missing_row_is_named(ledger: Ledger) -> None:
    fill(ledger)
    tamper(ledger, "DELETE FROM cf_audit WHERE seq = 7")
    assert problems(ledger)[0] == "audit: row 7 is missing"
