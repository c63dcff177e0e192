"""Keys and versions as people change them: signed, audited, and never locked out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey

from casparian_flow.config import Settings
from casparian_flow.db import audit, plugins, trust, views
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.errors import (
    ArtifactRefused,
    AuthError,
    CasparianError,
    NotFound,
    PublishConflict,
)
from casparian_flow.security import keys as files
from casparian_flow.security.signing import RotateKey, key_id, written
from casparian_flow.services import architect, keys
from tests.conftest import write_config
from tests.plugs import LOCK, OTHER, ROWS, signed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def here(ledger: Ledger, settings: Settings, folder: Path) -> Ledger:
    """A ledger with two versions of a plugin."""
    architect.deploy(ledger, settings, signed(ledger, folder))
    architect.deploy(ledger, settings, signed(ledger, folder, OTHER, "2.0.0"))
    return ledger


def new_key() -> str:
    return SigningKey.generate().verify_key.encode().hex()


def own_id(folder: Path) -> str:
    return key_id(files.local_key(folder).verify_key.encode())


def standing(ledger: Ledger, folder: Path) -> dict[str, str]:
    """Key id -> standing."""
    return {row["key_id"]: row["standing"] for row in keys.listing(ledger, folder)}


def active(ledger: Ledger) -> list[str]:
    return [row["version"] for row in ledger.read(views.plugins) if row["active"]]


def patterns(ledger: Ledger) -> list[str]:
    return [row["pattern"] for row in ledger.read(views.rules)]


def last_audit(ledger: Ledger) -> dict[str, Any]:
    row = ledger.read(lambda c: views.audit(c, 1, None))[0]
    return {**row, "detail": json.loads(row["detail"])}


def test_a_key_is_made_once_and_shown_again(folder: Path) -> None:
    assert not files.has_local_key(folder)
    key = files.local_key(folder)
    assert files.has_local_key(folder)
    assert files.local_key(folder) == key


def test_listing_an_unknown_own_key_says_so_and_makes_none(ledger: Ledger, folder: Path) -> None:
    assert keys.listing(ledger, folder) == []
    assert not folder.exists()
    own = own_id(folder)
    (row,) = keys.listing(ledger, folder)
    assert (row["key_id"], row["standing"], row["mine"]) == (own, "unknown here", True)


def test_trusting_in_an_empty_ledger_trusts_our_own_key_first(ledger: Ledger, folder: Path) -> None:
    done = keys.trust(ledger, folder, new_key(), "Ada", "sales*")
    assert done.first is not None
    assert done.key is not None
    assert (done.first.key_id, done.first.owner) == (own_id(folder), trust.person())
    assert (done.key.owner, done.key.plugins, done.deactivated) == ("Ada", "sales*", [])
    rows = {row["owner"]: row["plugins"] for row in keys.listing(ledger, folder)}
    assert rows == {trust.person(): "*", "Ada": "sales*"}


def test_trusting_our_own_key_in_an_empty_ledger_is_one_statement(
    ledger: Ledger, folder: Path
) -> None:
    public = files.local_key(folder).verify_key.encode().hex()
    with pytest.raises(CasparianError, match="last key that may manage keys"):
        keys.trust(ledger, folder, public, "Grace", "sales*")
    done = keys.trust(ledger, folder, public, "Grace", "*")
    assert (done.first is not None, done.key) == (True, None)
    (row,) = keys.listing(ledger, folder)
    assert (row["owner"], row["plugins"]) == ("Grace", "*")


@pytest.mark.parametrize("words", ["", "  ", "a\nb", "\x1b[31m", "x" * 201])
def test_owners_globs_and_reasons_are_words(
    here: Ledger, settings: Settings, folder: Path, words: str
) -> None:
    for attempt in (
        lambda: keys.trust(here, folder, new_key(), words, "*"),
        lambda: keys.trust(here, folder, new_key(), "Ada", words),
        lambda: keys.revoke(here, folder, own_id(folder), words),
        lambda: plugins.disable(here, folder, "rows", None, words),
        lambda: architect.activate(here, settings, folder, "rows", "1.0.0", words),
    ):
        with pytest.raises(CasparianError, match="is not a valid"):
            attempt()


def test_what_is_no_public_key_is_refused(here: Ledger, folder: Path) -> None:
    for text in ("", "ab", "AB" * 32, own_id(folder)[:-1] + "z"):
        with pytest.raises(AuthError, match="not a public key"):
            keys.trust(here, folder, text, "Ada", "*")


def test_revoking_stops_what_the_key_published(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    old = own_id(folder)
    keys.rotate(here, folder)
    done = keys.revoke(here, folder, old[:8], "laptop stolen")
    assert (done.key.key_id, done.already, done.deactivated) == (old, False, ["rows 2.0.0"])
    assert active(here) == []
    assert all("laptop stolen" in row["refusal"] for row in plugins.verify(here, None))
    assert last_audit(here)["action"] == "revoke-key"
    assert last_audit(here)["subject"] == f"key {old}"
    assert last_audit(here)["detail"]["reason"] == "laptop stolen"
    again = keys.revoke(here, folder, old, "again")
    assert (again.key.reason, again.already, again.deactivated) == ("laptop stolen", True, [])
    with pytest.raises(ArtifactRefused, match="laptop stolen"):
        architect.activate(here, settings, folder, "rows", "1.0.0", "please")
    # A revoked key's 2.0.0 must not stand above what comes after it.
    architect.deploy(here, settings, signed(here, folder, ROWS, "1.1.0"))
    assert active(here) == ["1.1.0"]


def test_bytes_of_a_revoked_key_are_not_taken_for_published_again(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    old = own_id(folder)
    keys.rotate(here, folder)
    assert keys.revoke(here, folder, old, "laptop stolen").deactivated == ["rows 2.0.0"]
    with pytest.raises(PublishConflict, match="laptop stolen") as refused:
        architect.deploy(here, settings, signed(here, folder, OTHER, "2.0.0"))
    assert "--version 2.0.1" in refused.value.hint


@pytest.mark.slow
def test_a_key_that_is_trusted_with_less_takes_its_versions_out_of_the_way(
    here: Ledger, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    other, public = tmp_path / "other", files.local_key(folder).verify_key.encode().hex()
    theirs = files.local_key(other).verify_key.encode().hex()
    keys.trust(here, folder, theirs, "Bob", "*")
    done = keys.trust(here, other, public, "Ada", "sales*")
    assert done.deactivated == ["rows 2.0.0"]
    assert active(here) == []
    architect.deploy(here, settings, signed(here, other, ROWS, "1.5.0"))
    assert active(here) == ["1.5.0"]


def test_the_last_key_that_may_change_keys_stays(here: Ledger, folder: Path) -> None:
    keys.trust(here, folder, new_key(), "Ada", "sales*")
    with pytest.raises(CasparianError, match="last key that may manage keys") as refused:
        keys.revoke(here, folder, own_id(folder), "why not")
    assert "casparian keys rotate" in refused.value.hint
    public = files.local_key(folder).verify_key.encode().hex()
    with pytest.raises(CasparianError, match="last key that may manage keys"):
        keys.trust(here, folder, public, "me", "rows")
    assert standing(here, folder)[own_id(folder)] == "trusted"


def test_a_key_is_found_by_the_beginning_of_its_id(here: Ledger, folder: Path) -> None:
    for _ in range(17):  # two of them begin with the same digit
        keys.trust(here, folder, new_key(), "Ada", "sales*")
    ids = list(standing(here, folder))
    twice = next(i[0] for n, i in enumerate(ids) if i[0] in {other[0] for other in ids[:n]})
    with pytest.raises(NotFound, match="keys have ids that begin"):
        keys.revoke(here, folder, twice, "r")
    for prefix in ("", "x"):
        with pytest.raises(NotFound, match="no key has an id"):
            keys.revoke(here, folder, prefix, "r")


def test_a_rotated_key_signs_and_the_old_ones_plugins_still_run(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    old = own_id(folder)
    keys.rotate(here, folder)
    assert standing(here, folder) == {old: "retired", own_id(folder): "trusted"}
    assert not any(row["refusal"] for row in plugins.verify(here, None))
    architect.deploy(here, settings, signed(here, folder, ROWS, "3.0.0"))
    assert last_audit(here)["detail"]["key"] == own_id(folder)


def test_a_rotation_interrupted_before_the_files_is_finished(here: Ledger, folder: Path) -> None:
    old, new = files.local_key(folder), files.next_key(folder)

    def first_half(connection: Connection) -> audit.Event:
        before = trust.read(connection)
        public_key = new.verify_key.encode().hex()
        statement = RotateKey(**before.link(old), public_key=public_key)
        return trust.append(connection, before, written(old, statement, new))[1]

    here.change(first_half, lambda event: [event])
    keys.rotate(here, folder)
    assert files.local_key(folder) == new
    assert standing(here, folder)[own_id(folder)] == "trusted"
    assert len(standing(here, folder)) == 2


@pytest.mark.slow
def test_a_key_of_several_ledgers_is_rotated_in_each(
    here: Ledger, folder: Path, tmp_path: Path
) -> None:
    elsewhere = write_config(tmp_path / "elsewhere")
    with open_ledger(elsewhere.database) as other:
        architect.deploy(other, elsewhere, signed(other, folder))
        old = own_id(folder)
        keys.rotate(here, folder)
        with pytest.raises(AuthError, match="not trusted"):
            architect.deploy(other, elsewhere, signed(other, folder, OTHER, "2.0.0"))
        new = own_id(folder)
        keys.rotate(other, folder)
        assert own_id(folder) == new
        assert standing(other, folder) == {old: "retired", new: "trusted"}
        architect.deploy(other, elsewhere, signed(other, folder, OTHER, "2.0.0"))


def test_a_stranger_changes_nothing(here: Ledger, settings: Settings, tmp_path: Path) -> None:
    theirs = tmp_path / "stranger"
    for attempt in (
        lambda: keys.trust(here, theirs, new_key(), "Ada", "*"),
        lambda: keys.revoke(here, theirs, next(iter(standing(here, theirs))), "r"),
        lambda: keys.rotate(here, theirs),
        lambda: plugins.disable(here, theirs, "rows", None, "r"),
        lambda: architect.activate(here, settings, theirs, "rows", "1.0.0", "r"),
    ):
        with pytest.raises(AuthError, match="is not trusted in this ledger"):
            attempt()
    assert active(here) == ["2.0.0"]


def test_activating_goes_back_with_the_older_ones_rules(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    assert patterns(here) == ["*.text"]
    architect.activate(here, settings, folder, "rows", "1.0.0", "2.0.0 loses lines")
    assert active(here) == ["1.0.0"]
    assert patterns(here) == ["*.txt"]
    said = last_audit(here)
    assert (said["action"], said["subject"]) == ("activate", "plugin rows 1.0.0")
    assert said["detail"]["reason"] == "2.0.0 loses lines"
    assert said["detail"]["signer"] == own_id(folder)


def test_a_disabled_version_takes_no_jobs_until_it_is_activated(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    plugins.disable(here, folder, "rows", "1.0.0", "old")
    assert active(here) == ["2.0.0"]
    assert "no version gets new jobs" in plugins.disable(here, folder, "rows", "2.0.0", "wrong")
    assert active(here) == []
    reasons = [row["refusal"].rpartition(": ")[2] for row in plugins.verify(here, "rows")]
    assert reasons == ["old", "wrong"]
    same = architect.deploy(here, settings, signed(here, folder, OTHER, "2.0.0"))
    assert "it was disabled: wrong" in same
    architect.activate(here, settings, folder, "rows", "1.0.0", "better than none")
    assert active(here) == ["1.0.0"]
    architect.deploy(here, settings, signed(here, folder, ROWS, "1.5.0"))
    assert active(here) == ["1.5.0"]


def test_a_plugin_disabled_as_a_whole_is_not_brought_back_by_a_new_version(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    plugins.disable(here, folder, "rows", None, "wrong by design")
    words = architect.deploy(here, settings, signed(here, folder, ROWS, "3.0.0"))
    assert "not active: it was disabled: wrong by design" in words
    assert active(here) == []
    architect.activate(here, settings, folder, "rows", "3.0.0", "mended")
    assert active(here) == ["3.0.0"]
    assert [bool(row["refusal"]) for row in plugins.verify(here, "rows")] == [True, True, False]


def test_what_is_not_there_is_named(here: Ledger, settings: Settings, folder: Path) -> None:
    with pytest.raises(NotFound, match=r"it has 1\.0\.0, 2\.0\.0"):
        architect.activate(here, settings, folder, "rows", "9", "r")
    for attempt in (
        lambda: plugins.disable(here, folder, "none", None, "r"),
        lambda: plugins.show(here, "none", None),
        lambda: plugins.verify(here, "none"),
        lambda: plugins.diff(here, "none", "1", "2"),
    ):
        with pytest.raises(NotFound, match="no plugin is named 'none'"):
            attempt()


def test_a_difference_is_of_source_and_of_pins(
    here: Ledger, settings: Settings, folder: Path
) -> None:
    more = LOCK + "more==2.0 \\\n    --hash=sha256:" + "0" * 64 + "\n"
    architect.deploy(here, settings, signed(here, folder, OTHER, "2.1.0", lock=more))
    assert plugins.diff(here, "rows", "1.0.0", "2.0.0").splitlines()[:2] == [
        "--- rows.py 1.0.0", "+++ rows.py 2.0.0",
    ]  # fmt: skip
    assert plugins.diff(here, "rows", "2.0.0", "2.1.0").splitlines() == [
        "--- lock 2.0.0", "+++ lock 2.1.0", "@@ -1 +1,2 @@", " rows-dep==1.0", "+more==2.0",
    ]  # fmt: skip
    assert plugins.diff(here, "rows", "2.0.0", "2.0.0") == ""
