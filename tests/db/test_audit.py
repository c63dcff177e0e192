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


def lost(ledger: Ledger, head: audit.Head) -> list[str]:
    return ledger.read(lambda c: list(audit.lost(c, head)))


def test_a_head_that_was_noted_is_still_there(ledger: Ledger) -> None:
    start = ledger.read(audit.head)
    fill(ledger)
    noted = ledger.read(audit.head)
    assert (start, noted.seq) == (audit.Head(0, audit.GENESIS), 10)
    fill(ledger)
    assert lost(ledger, start) == lost(ledger, noted) == []
    assert lost(ledger, noted._replace(hash="0" * 64))


def test_an_end_that_was_cut_off_is_seen_by_who_noted_it(ledger: Ledger) -> None:
    fill(ledger)
    noted = ledger.read(audit.head)
    tamper(ledger, "DELETE FROM cf_audit WHERE seq > 8")
    assert problems(ledger) == []
    assert lost(ledger, noted) == [
        "audit: row 10, whose hash was noted, is missing: the end was cut off"
    ]
    fill(ledger)
    assert problems(ledger) == []
    assert lost(ledger, noted) == [
        "audit: row 10 has another hash than was noted: it was written anew"
    ]
