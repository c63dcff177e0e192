"""The trust log: who may do what, and what a tampered row costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from casparian_flow.errors import AuthError
from casparian_flow.security.signing import (
    Activate,
    Disable,
    Link,
    RevokeKey,
    RotateKey,
    Row,
    TrustKey,
    key_id,
    written,
)
from casparian_flow.security.trust import KeyStatus, Trust, introduction, replay

LEDGER = "ab" * 16
ROOT, SALES, HR, NEW = (SigningKey(bytes([n]) * 32) for n in range(1, 5))


def public(key: SigningKey) -> str:
    return key.verify_key.encode().hex()


def name(key: SigningKey) -> str:
    return key_id(key.verify_key.encode())


class Log:
    """A trust log that is written to."""

    def __init__(self, root: SigningKey = ROOT) -> None:
        self.rows: list[Row] = []
        self.trust = Trust(ledger_id=LEDGER)
        self.add(introduction(root, LEDGER, "root@here"))

    def add(self, row: Row) -> Trust:
        self.trust = self.trust.after(row)
        self.rows.append(row)
        return self.trust

    def say(self, signer: SigningKey, kind: type[Link], **fields: Any) -> Trust:
        return self.add(written(signer, kind(**self.trust.link(signer), **fields)))

    def admit(self, key: SigningKey, plugins: str, signer: SigningKey = ROOT) -> Trust:
        return self.say(signer, TrustKey, public_key=public(key), owner="o", plugins=plugins)

    def rotate(self, old: SigningKey, new: SigningKey) -> Trust:
        statement = RotateKey(**self.trust.link(old), public_key=public(new))
        return self.add(written(old, statement, new))

    def replayed(self, rows: list[Row] | None = None) -> Trust:
        digests = tuple(row.digest for row in self.rows)
        return replay(LEDGER, tuple(self.rows if rows is None else rows), digests)


@pytest.fixture
def log() -> Log:
    log = Log()
    log.admit(SALES, "sales*")
    return log


def test_the_first_key_trusts_itself_with_everything() -> None:
    trust = Log().trust
    assert trust.authorize(ROOT.verify_key.encode(), "anything").owner == "root@here"
    assert trust.authorize(ROOT.verify_key.encode(), None).plugins == "*"


def test_the_first_row_must_be_a_keys_own_and_about_everything() -> None:
    empty = Trust(ledger_id=LEDGER)
    link = empty.link(ROOT)
    strange: list[Link] = [
        TrustKey(**link, public_key=public(SALES), owner="o", plugins="*"),
        TrustKey(**link, public_key=public(ROOT), owner="o", plugins="sales"),
        RevokeKey(**link, key_id=name(ROOT), reason="r"),
        Disable(**link, plugin="p", version=None, reason="r"),
        Activate(**link, plugin="p", version="1", artifact_sha256="", reason="r"),
    ]
    for statement in strange:
        with pytest.raises(AuthError):
            empty.after(written(ROOT, statement))
    with pytest.raises(AuthError, match="trusts no key yet"):
        empty.authorize(ROOT.verify_key.encode(), "sales")


def test_a_scoped_key_publishes_its_plugins_and_nothing_else(log: Log) -> None:
    trust = log.trust
    assert trust.authorize(SALES.verify_key.encode(), "sales_2026")
    with pytest.raises(AuthError, match=r"plugins sales\*, .* hr"):
        trust.authorize(SALES.verify_key.encode(), "hr")
    with pytest.raises(AuthError, match="keys"):
        trust.authorize(SALES.verify_key.encode(), None)
    assert trust.unfit(name(SALES), "sales") == ""
    assert "sales*" in trust.unfit(name(SALES), "hr")


def test_an_unknown_key_is_told_what_somebody_else_must_type(log: Log) -> None:
    with pytest.raises(AuthError, match=name(HR)[:16]) as refused:
        log.trust.authorize(HR.verify_key.encode(), "sales")
    assert f"casparian keys trust {public(HR)} --owner NAME" in refused.value.hint
    assert refused.value.exit_code == 77
    assert "never trusted" in log.trust.unfit(name(HR), "sales")


@pytest.mark.parametrize("signer", [SALES, HR])
def test_keys_are_changed_only_by_who_is_trusted_with_all(log: Log, signer: SigningKey) -> None:
    with pytest.raises(AuthError):
        log.admit(NEW, "*", signer)
    with pytest.raises(AuthError):
        log.admit(signer, "*", signer)
    with pytest.raises(AuthError):
        log.say(signer, RevokeKey, key_id=name(ROOT), reason="r")
    assert log.replayed() == log.trust


def test_a_revoked_key_signs_nothing_and_what_it_signed_stops(log: Log) -> None:
    assert log.trust.stopped(name(SALES), "sales", "1") == ""
    trust = log.say(ROOT, RevokeKey, key_id=name(SALES), reason="laptop stolen")
    assert "revoked: laptop stolen" in trust.stopped(name(SALES), "sales", "1")
    with pytest.raises(AuthError, match="revoked: laptop stolen"):
        trust.authorize(SALES.verify_key.encode(), "sales")
    with pytest.raises(AuthError, match="already"):
        log.admit(SALES, "*")
    with pytest.raises(AuthError, match="already known"):
        log.rotate(ROOT, SALES)
    with pytest.raises(AuthError, match="never trusted"):
        log.say(ROOT, RevokeKey, key_id=name(HR), reason="r")


def test_a_rotated_key_hands_on_what_it_had(log: Log) -> None:
    trust = log.rotate(SALES, NEW)
    assert trust.authorize(NEW.verify_key.encode(), "sales").plugins == "sales*"
    assert trust.keys[name(NEW)].owner == "o"
    assert trust.keys[name(SALES)].standing is KeyStatus.RETIRED
    assert trust.stopped(name(SALES), "sales", "1") == ""
    assert trust.unfit(name(SALES), "sales") == ""
    with pytest.raises(AuthError, match=f"key {name(NEW)[:16]} took its place"):
        trust.authorize(SALES.verify_key.encode(), "sales")
    with pytest.raises(AuthError, match="retired"):
        log.rotate(SALES, HR)
    log.say(ROOT, RevokeKey, key_id=name(SALES), reason="r")
    assert log.trust.stopped(name(SALES), "sales", "1")
    assert not log.trust.stopped(name(NEW), "sales", "1")


def test_a_rotation_needs_both_keys(log: Log) -> None:
    statement = RotateKey(**log.trust.link(SALES), public_key=public(NEW))
    for row in (written(SALES, statement), written(SALES, statement, HR)):
        with pytest.raises(AuthError, match="signature does not match"):
            log.add(row)


def test_a_second_signature_where_none_belongs_is_refused(log: Log) -> None:
    row = written(ROOT, Disable(**log.trust.link(ROOT), plugin="p", version=None, reason="r"), NEW)
    with pytest.raises(AuthError, match="second signature"):
        log.add(row)


def test_versions_are_disabled_and_activated_again(log: Log) -> None:
    def stopped(version: str) -> str:
        return log.trust.stopped(name(ROOT), "sales", version)

    log.say(SALES, Disable, plugin="sales", version="1", reason="wrong totals")
    assert stopped("1") == "it was disabled: wrong totals"
    assert not stopped("2")
    again = {"version": "1", "artifact_sha256": "", "reason": "was right"}
    log.say(SALES, Activate, plugin="sales", **again)
    assert not stopped("1")
    log.say(SALES, Disable, plugin="sales", version=None, reason="all wrong")
    assert stopped("1") == stopped("2") == stopped("3") == "it was disabled: all wrong"
    log.say(SALES, Activate, plugin="sales", **again)
    assert not stopped("1")
    assert stopped("2")
    assert not log.trust.stopped(name(ROOT), "sales_2", "1")
    for kind, fields in ((Activate, again), (Disable, {"version": None, "reason": "r"})):
        with pytest.raises(AuthError, match="not with hr"):
            log.say(SALES, kind, plugin="hr", **fields)
    assert log.replayed() == log.trust


def test_statements_hold_in_their_place_only(log: Log) -> None:
    link = log.trust.link(ROOT)
    disable = {"plugin": "p", "version": None, "reason": "r"}
    for change, words in (
        ({"ledger_id": "cd" * 16}, "another ledger"),
        ({"seq": 4}, "row 3 of the trust log is missing"),
        ({"seq": 2}, "row 3 of the trust log is missing"),
        ({"previous": "0" * 64}, "does not follow"),
        ({"signer_key_id": name(SALES)}, "another key than the one"),
    ):
        with pytest.raises(AuthError, match=words):
            log.add(written(ROOT, Disable(**{**link, **change}, **disable)))
    row = written(ROOT, Disable(**{**link, "seq": 9}, **disable))
    with pytest.raises(AuthError, match="does not follow"):
        log.add(row._replace(seq=3))
    log.add(written(ROOT, Disable(**link, **disable)))


def long_log() -> Log:
    log = Log()
    log.admit(SALES, "sales*")
    log.say(SALES, Disable, plugin="sales", version=None, reason="r")
    log.rotate(SALES, NEW)
    log.say(NEW, Activate, plugin="sales", version="1", artifact_sha256="ab", reason="r")
    log.say(ROOT, RevokeKey, key_id=name(NEW), reason="r")
    return log


LONG = long_log()


def altered(row: Row) -> Iterator[Row]:
    """The row with one column changed: every byte of keys and signatures, many of the payload."""
    for kind in ("", "publish", "trust-key", "revoke-key", "rotate-key", "activate", "disable"):
        if kind != row.kind:
            yield row._replace(kind=kind)
    for column in ("payload", "public_key", "signature", "countersignature"):
        value = getattr(row, column)
        for where in range(0, len(value), 7 if column == "payload" else 1):
            turned = bytes([value[where] ^ 1 << where % 8])
            yield row._replace(**{column: value[:where] + turned + value[where + 1 :]})
        yield row._replace(**{column: value + b"x"})
        if value:
            yield row._replace(**{column: b""})


@pytest.mark.parametrize("number", range(len(LONG.rows)))
def test_any_altered_column_is_refused_and_its_row_named(number: int) -> None:
    rows = LONG.rows
    for row in altered(rows[number]):
        trust = LONG.replayed([*rows[:number], row, *rows[number + 1 :]])
        assert trust.broken.startswith(f"row {number + 1} of the trust log"), row
        with pytest.raises(AuthError):
            trust.authorize(ROOT.verify_key.encode(), "sales")
        with pytest.raises(AuthError):
            trust.after(introduction(HR, LEDGER, "me"))


def test_rows_in_another_order_are_refused() -> None:
    assert "row 1" in LONG.replayed(LONG.rows[::-1]).broken
    swapped = [*LONG.rows[:2], LONG.rows[3], LONG.rows[2], *LONG.rows[4:]]
    assert "row 3" in LONG.replayed(swapped).broken
    renumbered = [row._replace(seq=n) for n, row in enumerate(swapped, 1)]
    assert "row 3" in LONG.replayed(renumbered).broken


@given(st.sets(st.integers(0, len(LONG.rows) - 1), min_size=1))
def test_any_rows_that_are_missing_are_noticed(missing: set[int]) -> None:
    rows = [row for number, row in enumerate(LONG.rows) if number not in missing]
    trust = LONG.replayed(rows)
    assert trust.broken.startswith(f"row {min(missing) + 1} of the trust log")
    with pytest.raises(AuthError):
        trust.after(introduction(HR, LEDGER, "me"))


def test_a_row_that_the_audit_does_not_have_is_noticed() -> None:
    digests = tuple(row.digest for row in LONG.rows[:-1])
    broken = replay(LEDGER, tuple(LONG.rows), digests).broken
    assert broken == f"row {len(LONG.rows)} of the trust log is not in the audit"


def test_the_log_of_another_ledger_is_worth_nothing() -> None:
    digests = tuple(row.digest for row in LONG.rows)
    assert "for another ledger" in replay("cd" * 16, tuple(LONG.rows), digests).broken


def test_a_key_in_other_letters_is_not_another_key(log: Log) -> None:
    for text in (public(SALES).upper(), public(SALES)[:-2], public(SALES) + " ", "", "zz" * 32):
        statement = TrustKey(**log.trust.link(ROOT), public_key=text, owner="o", plugins="*")
        with pytest.raises(AuthError, match="not a public key"):
            log.add(written(ROOT, statement))


def test_trust_is_a_value() -> None:
    before = Log().trust
    copy = msgspec.structs.replace(before)
    row = written(ROOT, Disable(**before.link(ROOT), plugin="p", version=None, reason="r"))
    assert before.after(row) != before
    assert before == copy
