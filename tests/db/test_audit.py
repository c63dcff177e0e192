"""The audit's chain: whole, and broken by any change."""

from __future__ import annotations

import pytest
from sqlalchemy import insert, select, text

from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.db import audit
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.models import AuditEntry, RoutingRule
from casparian_flow.errors import CasparianError


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
    assert "audit row 4 was changed" in problems(ledger)


def test_a_missing_row_is_named(ledger: Ledger) -> None:
    fill(ledger)
    tamper(ledger, "DELETE FROM cf_audit WHERE seq = 7")
    assert problems(ledger)[0] == "audit row 7 is missing"


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
        "audit row 10, the given head, is missing: the end of the audit was cut off"
    ]
    fill(ledger)
    assert problems(ledger) == []
    assert lost(ledger, noted) == [
        "audit row 10 has another hash than the given head: the audit was rewritten"
    ]


# What a person changes.


class Watched:
    """A ledger's `wake`, which remembers with what it was called and what the audit had then."""

    def __init__(self, settings: Settings) -> None:
        self.calls: list[tuple[bool, int]] = []
        self._settings = settings

    def __call__(self, database: DatabaseSettings, scan: bool) -> None:
        assert database == self._settings.database
        with open_ledger(database) as other:
            self.calls.append((scan, other.read(audit.head).seq))


def add_rule(connection: Connection) -> int:
    statement = insert(RoutingRule).values(pattern="*.csv", tag="t", priority=0)
    return connection.execute(statement.returning(RoutingRule.id)).scalar_one()


def test_a_change_is_audited_in_its_transaction_and_then_wakes_the_daemon(
    settings: Settings,
) -> None:
    wake = Watched(settings)
    with open_ledger(settings.database, wake) as ledger:

        def events(rule_id: int) -> list[audit.Event]:
            ours = audit.Event("add-rule", f"rule {rule_id}", {"tag": "t"})
            return [ours, ours._replace(actor="Ada")]

        assert ledger.change(add_rule, events, scan=True) == 1
        rows = select(AuditEntry.actor, AuditEntry.action, AuditEntry.subject, AuditEntry.detail)
        found = [tuple(row) for row in ledger.read(lambda c: c.execute(rows).all())]
        row = ("add-rule", "rule 1", '{"tag": "t"}')
        assert found[:2] == [(audit.actor(), *row), ("Ada", *row)]
        assert [each[1] for each in found[2:]] == ["seal"]
        assert problems(ledger) == []
    assert wake.calls == [(True, 3)], "all rows were there when it was told"


@pytest.mark.parametrize("fault", ["work", "audit"])
def test_a_change_that_fails_leaves_nothing_and_wakes_nobody(
    settings: Settings, fault: str
) -> None:
    wake = Watched(settings)

    def work(connection: Connection) -> None:
        add_rule(connection)
        if fault == "work":
            raise CasparianError("no")

    def events(_: None) -> list[audit.Event]:
        raise CasparianError("no")

    with open_ledger(settings.database, wake) as ledger:
        with pytest.raises(CasparianError, match="no"):
            ledger.change(work, events)
        assert ledger.read(lambda c: c.execute(select(RoutingRule.id)).first()) is None
        assert ledger.read(audit.head) == (0, audit.GENESIS)
    assert wake.calls == []


def test_what_needs_no_audit_row_was_no_change(settings: Settings) -> None:
    wake = Watched(settings)
    with open_ledger(settings.database, wake) as ledger:
        assert ledger.change(lambda _: "as before", lambda _: []) == "as before"
    assert wake.calls == []
