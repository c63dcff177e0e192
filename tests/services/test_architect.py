"""Deploying: what is checked, what is refused, and that it is done whole or not at all."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from casparian_flow.config import AzureSettings, Settings
from casparian_flow.db import audit, plugins, trust, views
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.errors import AuthError, CasparianError, PluginError, PublishConflict
from casparian_flow.protocol import Deploy
from casparian_flow.security import keys as key_files
from casparian_flow.security import signing
from casparian_flow.security.signing import AzureAuth
from casparian_flow.services import architect
from casparian_flow.services import keys as key_verbs
from tests.conftest import write_config
from tests.plugs import LOCK, OTHER, ROWS, signed


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """The keys of somebody else."""
    return tmp_path / "stranger"


def dump(settings: Settings) -> list[str]:
    """The whole database as SQL."""
    with contextlib.closing(sqlite3.connect(settings.database.path)) as database:
        return list(database.iterdump())


def rows(ledger: Ledger) -> dict[str, bool]:
    """Deployed version -> whether it is active."""
    return {row["version"]: row["active"] for row in ledger.read(views.plugins)}


def forged(message: Deploy, keys: Path, **fields: Any) -> Deploy:
    """The same with another statement, well signed."""
    statement = msgspec.json.decode(message.statement, type=signing.Publish)
    changed = msgspec.structs.replace(statement, **fields)
    payload, signature = signing.sign(key_files.local_key(keys), changed)
    return msgspec.structs.replace(message, statement=payload, signature=signature)


def refused(ledger: Ledger, settings: Settings, message: Deploy, words: str) -> CasparianError:
    """Deploying it fails with these words and changes nothing."""
    before = dump(settings)
    with pytest.raises(CasparianError, match=words) as error:
        architect.deploy(ledger, settings, message)
    assert dump(settings) == before
    return error.value


def test_the_first_key_is_trusted_said_aloud_and_audited(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    words = architect.deploy(ledger, settings, signed(ledger, keys))
    key = signing.key_id(key_files.local_key(keys).verify_key.encode())
    assert f"key {key[:16]} of {trust.person()} is the first key" in words
    newest, first = ledger.read(lambda c: views.audit(c, 9, None))
    assert (first["action"], first["subject"]) == ("trust-key", f"key {key}")
    assert (newest["action"], newest["actor"]) == ("publish", trust.person())
    assert json.loads(newest["detail"])["key"] == key
    assert json.loads(newest["detail"])["owner"] == trust.person()
    again = architect.deploy(ledger, settings, signed(ledger, keys, OTHER, "2.0.0"))
    assert "first" not in again
    assert rows(ledger) == {"1.0.0": False, "2.0.0": True}


def test_a_dry_run_checks_everything_and_changes_nothing(
    ledger: Ledger, settings: Settings, keys: Path, stranger: Path
) -> None:
    before = dump(settings)
    words = architect.deploy(ledger, settings, signed(ledger, keys, dry_run=True))
    assert "nothing was changed" in words
    assert "is the first key" in words
    assert "deployed rows 1.0.0" in words
    assert dump(settings) == before
    architect.deploy(ledger, settings, signed(ledger, keys))
    before = dump(settings)
    words = architect.deploy(ledger, settings, signed(ledger, keys, OTHER, "2.0.0", dry_run=True))
    assert "deployed rows 2.0.0" in words
    assert dump(settings) == before
    conflict = signed(ledger, keys, OTHER, dry_run=True)
    assert isinstance(refused(ledger, settings, conflict, "already exists"), PublishConflict)
    unknown = signed(ledger, stranger, OTHER, "2.0.0", dry_run=True)
    assert isinstance(refused(ledger, settings, unknown, "not trusted"), AuthError)


def test_the_same_bytes_again_are_no_error_and_other_bytes_are(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    architect.deploy(ledger, settings, signed(ledger, keys))
    before = dump(settings)
    assert "already deployed" in architect.deploy(ledger, settings, signed(ledger, keys))
    assert dump(settings) == before
    error = refused(ledger, settings, signed(ledger, keys, OTHER), "already exists")
    assert "--version 1.0.1" in error.hint
    assert error.exit_code == 65
    refused(
        ledger, settings, signed(ledger, keys, lock=LOCK.replace("1.0", "1.1")), "already exists"
    )


def test_newer_by_pep_440_becomes_active(ledger: Ledger, settings: Settings, keys: Path) -> None:
    for version in ("1.9.0", "1.10.0"):
        architect.deploy(ledger, settings, signed(ledger, keys, version=version))
    words = architect.deploy(ledger, settings, signed(ledger, keys, version="1.10.0rc1"))
    assert "not active: 1.10.0 is newer" in words
    assert rows(ledger) == {"1.9.0": False, "1.10.0": True, "1.10.0rc1": False}
    assert architect.next_version(ledger, "rows") == "1.10.1"


def test_an_unknown_key_is_refused(
    ledger: Ledger, settings: Settings, keys: Path, stranger: Path
) -> None:
    early = signed(ledger, stranger)  # it offers itself as the first, and comes too late
    architect.deploy(ledger, settings, signed(ledger, keys))
    for message in (early, signed(ledger, stranger, OTHER, "2.0.0")):
        error = refused(ledger, settings, message, "is not trusted in this ledger")
        assert error.exit_code == 77
        public = key_files.local_key(stranger).verify_key.encode().hex()
        assert f"casparian keys trust {public} --owner NAME" in error.hint
    key_verbs.trust(ledger, keys, public, "Ada", "other*")
    refused(ledger, settings, signed(ledger, stranger, OTHER, "2.0.0"), "rows")
    key_verbs.trust(ledger, keys, public, "Ada", "row?")
    architect.deploy(ledger, settings, signed(ledger, stranger, OTHER, "2.0.0"))
    published = ledger.read(lambda c: views.audit(c, 1, None))[0]
    assert (published["actor"], published["action"]) == ("Ada", "publish")
    owners = {row["owner"]: row["mine"] for row in key_verbs.listing(ledger, stranger)}
    assert owners == {trust.person(): False, "Ada": True}


def test_retired_and_revoked_keys_publish_nothing_more(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    architect.deploy(ledger, settings, signed(ledger, keys))
    by_old = signed(ledger, keys, OTHER, "2.0.0")
    key_verbs.rotate(ledger, keys)
    refused(ledger, settings, by_old, "is retired: key .* took its place")
    by_new = signed(ledger, keys, OTHER, "2.0.0")
    architect.deploy(ledger, settings, by_new)
    old = signing.key_id(by_old.public_key)
    key_verbs.revoke(ledger, keys, old[:6], "lost")
    refused(ledger, settings, by_old, "is revoked: lost")


def test_what_was_sent_must_be_what_was_signed(
    ledger: Ledger, settings: Settings, keys: Path, stranger: Path
) -> None:
    sent = signed(ledger, keys)
    change = msgspec.structs.replace
    other_key = key_files.local_key(stranger).verify_key.encode()
    for message, words in (
        (change(sent, source=OTHER.encode()), "artifact_sha256"),
        (change(sent, lock=LOCK + " "), "lock_sha256"),
        (change(sent, file_name="other.py"), "plugin differ"),
        (change(sent, public_key=other_key), "signature does not match"),
        (change(sent, public_key=b""), "signature does not match"),
        (change(sent, signature=sent.signature[:-1]), "signature does not match"),
        (change(sent, statement=sent.statement + b" "), "signature does not match"),
        (change(sent, statement=b""), "signature does not match"),
        (forged(sent, keys, plugin="other"), "plugin differ"),
        (forged(sent, keys, version="01.0"), "version differ"),
        (forged(sent, keys, version="../1"), "not a version of PEP 440"),
        (forged(sent, keys, artifact_size=1), "artifact_size"),
        (forged(sent, keys, artifact_sha256="0" * 64), "artifact_sha256"),
        (forged(sent, keys, ledger_id="0" * 32), "ledger_id"),
        (forged(sent, keys, publisher_key_id="0" * 64), "publisher_key_id"),
        (forged(sent, keys, auth=AzureAuth(tenant="t", object_id="o", issuer="i")), "Azure"),
    ):
        refused(ledger, settings, message, words)
    architect.deploy(ledger, settings, sent)


def test_what_was_signed_for_another_ledger_is_refused(
    ledger: Ledger, settings: Settings, keys: Path, tmp_path: Path
) -> None:
    elsewhere = write_config(tmp_path / "elsewhere")
    with open_ledger(elsewhere.database) as other:
        message = signed(other, keys)
        architect.deploy(other, elsewhere, message)
    refused(ledger, settings, message, "ledger_id")
    architect.deploy(ledger, settings, signed(ledger, keys))
    refused(ledger, settings, message, "ledger_id")


def test_an_introduction_of_anybody_else_is_refused(
    ledger: Ledger, settings: Settings, keys: Path, stranger: Path
) -> None:
    mine, theirs = signed(ledger, keys), signed(ledger, stranger)
    mixed = msgspec.structs.replace(mine, introduction=theirs.introduction)
    refused(ledger, settings, mixed, "signature does not match")
    none = msgspec.structs.replace(mine, introduction=None)
    refused(ledger, settings, none, "trusts no key yet")


def test_where_publishers_must_sign_in_a_key_alone_is_not_enough(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    azure = AzureSettings(tenant_id=str(uuid4()), client_id=str(uuid4()))
    strict = msgspec.structs.replace(settings, azure=azure)
    error = refused(ledger, strict, signed(ledger, keys), "must sign in to Azure")
    assert isinstance(error, AuthError)


def test_a_plugin_that_is_none_is_refused(ledger: Ledger, settings: Settings, keys: Path) -> None:
    error = refused(ledger, settings, signed(ledger, keys, "import os\n"), "MANIFEST")
    assert isinstance(error, PluginError)
    sink = ROWS.replace('topic="lines"', 'sinks={"lines": "ftp://x"}')
    refused(ledger, settings, signed(ledger, keys, sink), "ftp")


PUBLISHER = """
import sys
from pathlib import Path
from casparian_flow import config
from casparian_flow.db.access import open_ledger
from casparian_flow.errors import PublishConflict
from casparian_flow.services import architect
from tests.plugs import ROWS, signed

settings = config.load(sys.argv[1])
with open_ledger(settings.database) as ledger:
    message = signed(ledger, Path(sys.argv[2]), ROWS + "# " + sys.argv[3])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        architect.deploy(ledger, settings, message)
        print("won")
    except PublishConflict:
        print("lost")
"""


@pytest.mark.slow
def test_of_two_who_publish_one_version_at_once_exactly_one_wins(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    architect.deploy(ledger, settings, signed(ledger, keys, version="0.1"))
    file = str(settings.home / "global_config.toml")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    crowd = [
        subprocess.Popen([sys.executable, "-c", PUBLISHER, file, str(keys), word], **pipes)
        for word in ("this", "that", "other")
    ]
    for one in crowd:
        assert one.stdout
        assert one.stdout.readline() == "ready\n"
    said = [one.communicate("go\n")[0] for one in crowd]
    assert sorted(said) == ["lost\n", "lost\n", "won\n"]
    assert rows(ledger) == {"0.1": False, "1.0.0": True}
    winner = ("this", "that", "other")[said.index("won\n")]
    stored = ledger.read(lambda c: plugins.find(c, "rows", "1.0.0"))
    assert stored.source.decode().endswith(f"# {winner}")
    assert ledger.read(lambda c: list(audit.problems(c))) == []


KILLED = """
import contextlib, os, signal, sqlite3, sys
from pathlib import Path
from casparian_flow import config
from casparian_flow.db.access import open_ledger
from casparian_flow.services import architect
from tests.plugs import signed

settings = config.load(sys.argv[1])

def deploy(write):
    with open_ledger(settings.database) as ledger:
        message = signed(ledger, Path(sys.argv[2]))
        left = [write]

        def count(statement):
            if statement.lstrip()[:6] in ("INSERT", "DELETE", "UPDATE"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        ledger.write(lambda c: c.driver.set_trace_callback(count))
        architect.deploy(ledger, settings, message)

def dump():
    with contextlib.closing(sqlite3.connect(settings.database.path)) as database:
        return list(database.iterdump())

before = dump()
for write in range(1, 40):
    child = os.fork()
    if not child:
        deploy(write)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        print(write - 1)
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert dump() == before
"""


@pytest.mark.slow
def test_a_killed_publish_leaves_nothing_half_deployed(
    ledger: Ledger, settings: Settings, keys: Path
) -> None:
    """Killed after each of its writes in turn, until one survives."""
    key_files.local_key(keys)
    command = [sys.executable, "-c", KILLED, settings.home / "global_config.toml", keys]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 7  # trust, its audit, plugin, rules, subscription, topics, audit
    assert rows(ledger) == {"1.0.0": True}
    assert ledger.read(lambda c: list(audit.problems(c))) == []


def test_a_version_is_the_same_however_it_is_written(
    ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    architect.deploy(ledger, settings, signed(ledger, tmp_path, version="1.0.0"))
    with pytest.raises(PublishConflict, match=r"rows 1\.0\.0 already exists") as refused:
        other = signed(ledger, tmp_path, source=ROWS + "\n# other\n", version="1.0")
        architect.deploy(ledger, settings, other)
    assert "--version 1.0.1" in refused.value.hint
