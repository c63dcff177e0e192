"""What somebody with write access to the database can alter: each is refused and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from nacl.signing import SigningKey
from sqlalchemy import text

from casparian_flow.config import Settings
from casparian_flow.db import plugins
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.engine.dispatch import artifact
from casparian_flow.errors import CasparianError
from casparian_flow.security import keys, signing
from casparian_flow.security.manifest import read_manifest
from casparian_flow.services import architect
from casparian_flow.services import keys as key_verbs
from casparian_flow.services.verify import verify
from tests.db.real_ledger import attacker
from tests.plugs import ROWS, signed

Change = Callable[[Connection], None]


class Undo(Exception):
    """Takes back what a test altered."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def deployed(ledger: Ledger, settings: Settings, folder: Path) -> Ledger:
    """A plugin, and a trust log with every kind of statement in it."""
    architect.deploy(ledger, settings, signed(ledger, folder))
    friend = SigningKey.generate().verify_key.encode().hex()
    key_verbs.trust(ledger, folder, friend, "Ada", "sales*")
    key_verbs.rotate(ledger, folder)
    plugins.disable(ledger, folder, "rows", None, "a test")
    architect.activate(ledger, settings, folder, "rows", "1.0.0", "a test")
    (ada,) = (row["key_id"] for row in key_verbs.listing(ledger, folder) if row["owner"] == "Ada")
    key_verbs.revoke(ledger, folder, ada, "a test")

    def drop(connection: Connection) -> None:
        for table in ("cf_plugin", "cf_trust_statement", "cf_audit", "cf_ledger_identity"):
            for verb in ("update", "delete"):
                connection.execute(text(f"DROP TRIGGER {table}_no_{verb}"))

    ledger.write(drop)
    assert refusal_after(ledger, lambda c: None) == ""
    return ledger


def refusal_after(ledger: Ledger, change: Change) -> str:
    """What a worker is told after a change, which is then taken back."""

    def work(connection: Connection) -> None:
        change(connection)
        found = artifact(connection, 1)
        assert not (found.refusal and (found.source or found.lock))
        raise Undo(found.refusal)

    with pytest.raises(Undo) as undone:
        ledger.write(work)
    return str(undone.value)


def setting(table: str, column: str, value: object, where: str = "1") -> Change:
    statement = text(f"UPDATE {table} SET {column} = :value WHERE {where}")
    return lambda connection: connection.execute(statement, {"value": value}) and None


def value_of(ledger: Ledger, table: str, column: str, where: str = "1") -> bytes:
    query = text(f"SELECT CAST({column} AS BLOB) FROM {table} WHERE {where}")
    value = ledger.read(lambda c: c.execute(query).scalar_one())
    assert isinstance(value, bytes)
    return value


def turned(data: bytes, step: int) -> Iterator[bytes]:
    """The data with one bit turned, at every step-th byte, and at the last."""
    for where in sorted({*range(0, len(data), step), len(data) - 1} if data else ()):
        yield data[:where] + bytes([data[where] ^ 1 << where % 8]) + data[where + 1 :]


@pytest.mark.parametrize(
    ("column", "step"),
    [
        ("source", 9), ("lock", 1), ("statement", 5), ("signature", 1), ("public_key", 1),
        ("name", 1), ("version", 1), ("artifact_hash", 5), ("publisher", 5), ("manifest", 5),
    ],
)  # fmt: skip
def test_no_byte_of_a_plugin_can_be_altered(deployed: Ledger, column: str, step: int) -> None:
    value = value_of(deployed, "cf_plugin", column)
    text_too = column in ("name", "version", "lock", "manifest", "artifact_hash", "publisher")
    for other in [*turned(value, step), value + b"x", value[:-1], b""]:
        forms: list[object] = [other]
        if text_too and (words := other.decode("latin-1")).isprintable():
            forms.append(words)
        for form in forms:
            words = refusal_after(deployed, setting("cf_plugin", column, form))
            assert words.startswith("plugin "), (column, form)
            assert "may not run: " in words
            if column not in ("name", "version"):
                assert words.startswith("plugin rows 1.0.0 may not run: ")


def test_a_statement_that_is_gone_is_refused_as_an_earlier_releases(deployed: Ledger) -> None:
    words = refusal_after(deployed, setting("cf_plugin", "statement", None))
    assert "publish it again under a new version" in words


@pytest.mark.parametrize("column", ["payload", "public_key", "signature", "countersignature"])
def test_no_byte_of_the_trust_log_can_be_altered(deployed: Ledger, column: str) -> None:
    for seq in range(1, 7):
        where = f"seq = {seq}"
        value = value_of(deployed, "cf_trust_statement", column, where)
        step = 1 if column != "payload" else 29
        for other in [*turned(value, step), value + b"x"]:
            change = setting("cf_trust_statement", column, other, where)
            assert f"row {seq} of the trust log" in refusal_after(deployed, change)


def test_kinds_and_numbers_of_the_trust_log_cannot_be_altered(deployed: Ledger) -> None:
    for seq in range(1, 7):
        where = f"seq = {seq}"
        for kind in ("trust-key", "activate", "publish", "", b"\xff"):
            if value_of(deployed, "cf_trust_statement", "kind", where).decode() != kind:
                change = setting("cf_trust_statement", "kind", kind, where)
                assert f"row {seq} of the trust log" in refusal_after(deployed, change)
        moved = setting("cf_trust_statement", "seq", seq + 50, where)
        assert f"row {seq} of the trust log" in refusal_after(deployed, moved)


def test_no_row_of_the_trust_log_can_be_removed(deployed: Ledger, folder: Path) -> None:
    for seq in range(1, 7):
        for which in (f"seq = {seq}", f"seq >= {seq}"):
            gone = text(f"DELETE FROM cf_trust_statement WHERE {which}")
            words = refusal_after(deployed, lambda c, gone=gone: c.execute(gone) and None)
            assert f"row {seq} of the trust log" in words


def test_rows_of_the_trust_log_that_are_in_no_audit_are_refused(deployed: Ledger) -> None:
    last = text("DELETE FROM cf_audit WHERE action = 'revoke-key'")
    words = refusal_after(deployed, lambda c: c.execute(last) and None)
    assert "row 6 of the trust log is not in the audit" in words
    for detail in ("{}", "", "[]", b"\xff", '{"sha256": 1}'):
        change = setting("cf_audit", "detail", detail, "action = 'disable'")
        assert "row 4 of the trust log" in refusal_after(deployed, change)


def test_the_ledgers_identity_cannot_be_altered(deployed: Ledger) -> None:
    assert "for another ledger" in refusal_after(
        deployed, setting("cf_ledger_identity", "id", "0" * 32)
    )
    none = text("DELETE FROM cf_ledger_identity")
    assert "for another ledger" in refusal_after(deployed, lambda c: c.execute(none) and None)


def test_a_broken_trust_log_takes_no_change_and_no_plugin(
    deployed: Ledger, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    """Not even a first key: an emptied log is not a new one."""
    deployed.write(lambda c: c.execute(text("DELETE FROM cf_trust_statement")) and None)
    for attempt in (
        lambda: architect.deploy(deployed, settings, signed(deployed, tmp_path / "new")),
        lambda: key_verbs.trust(deployed, folder, "ab" * 32, "Ada", "*"),
        lambda: key_verbs.rotate(deployed, folder),
        lambda: key_verbs.listing(deployed, folder),
        lambda: architect.activate(deployed, settings, folder, "rows", "1.0.0", "why not"),
        lambda: plugins.disable(deployed, folder, "rows", None, "why not"),
    ):
        with pytest.raises(CasparianError, match="row 1 of the trust log"):
            attempt()
    problems = verify(settings, deployed).problems
    assert "row 1 of the trust log is missing, but the audit has it" in problems


def problems_of(settings: Settings, ledger: Ledger) -> list[str]:
    """What `verify` says, but of the triggers that these tests drop."""
    problems = verify(settings, ledger).problems
    return [words for words in problems if not words.startswith("trigger ")]


def test_verify_names_what_was_altered_and_not_what_was_disabled(
    deployed: Ledger, settings: Settings, folder: Path
) -> None:
    plugins.disable(deployed, folder, "rows", "1.0.0", "a test")
    assert problems_of(settings, deployed) == []
    (row,) = plugins.verify(deployed, "rows")
    assert row["refusal"] == "plugin rows 1.0.0 may not run: it was disabled: a test"
    with attacker(settings) as other:
        other.execute("UPDATE cf_plugin SET lock = 'another'")
    changed, problem = problems_of(settings, deployed)
    assert changed.startswith("plugin 1 (rows 1.0.0) was changed")
    assert problem.startswith("plugin rows 1.0.0: its source or lock")


def smuggled(ledger: Ledger, keys_of: Path, name: str) -> str:
    """What a worker is told of a plugin that somebody wrote into the table, well signed."""
    source = ROWS.replace('topic="lines"', f'topic="lines", name="{name}"')
    message = signed(ledger, keys_of, source, "1.0.0", name)

    def work(connection: Connection) -> None:
        plugin_id = plugins.add(
            connection,
            name=name,
            version="1.0.0",
            source=message.source,
            lock=message.lock,
            manifest=msgspec.json.encode(read_manifest(message.source, f"{name}.py")).decode(),
            artifact_hash=signing.artifact_hash(message.source, message.lock),
            public_key=message.public_key,
            signature=message.signature,
            publisher=signing.key_id(message.public_key),
            statement=message.statement,
        )
        raise Undo(artifact(connection, plugin_id).refusal)

    with pytest.raises(Undo) as undone:
        ledger.write(work)
    return str(undone.value)


def test_a_version_that_was_activated_runs_with_those_bytes_only(
    deployed: Ledger, folder: Path
) -> None:
    """Though a trusted key has signed the others, for the same version."""
    other = signed(deployed, folder, f"{ROWS}\n# other\n")
    values = {
        "source": other.source, "lock": other.lock, "signature": other.signature,
        "statement": other.statement, "public_key": other.public_key,
        "publisher": signing.key_id(other.public_key),
        "artifact_hash": signing.artifact_hash(other.source, other.lock),
    }  # fmt: skip
    setters = ", ".join(f"{name} = :{name}" for name in values)
    statement = text(f"UPDATE cf_plugin SET {setters}")
    words = refusal_after(deployed, lambda c: c.execute(statement, values) and None)
    assert "the statement that activated it names another artifact" in words


def test_a_plugin_that_was_not_deployed_by_us_runs_only_if_we_would_have(
    ledger: Ledger, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    architect.deploy(ledger, settings, signed(ledger, folder))
    assert smuggled(ledger, folder, "another") == ""
    scoped = tmp_path / "scoped"
    assert "was never trusted" in smuggled(ledger, scoped, "sales")
    public = keys.local_key(scoped).verify_key.encode().hex()
    key_verbs.trust(ledger, folder, public, "Ada", "sales*")
    assert smuggled(ledger, scoped, "sales") == ""
    assert "only with plugins sales*" in smuggled(ledger, scoped, "hr")
