"""Keys, versions and the audit from the command line, and who is told what."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from pathlib import Path

import pytest

from casparian_flow import config
from casparian_flow.db.access import open_ledger
from casparian_flow.services import architect
from tests.commands import Casparian
from tests.daemons import said
from tests.plugs import OTHER, ROWS, signed

pytestmark = pytest.mark.usefixtures("own_keys")


@contextlib.contextmanager
def as_stranger(tmp_path: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "stranger"))
        yield


def deploy(casparian: Casparian, version: str, source: str = ROWS) -> None:
    """Publish without the seconds that locking takes."""
    settings = config.load(str(casparian.folder / config.FILE_NAME))
    with open_ledger(settings.database) as ledger:
        message = signed(ledger, config.keys_folder(), source, version)
        architect.deploy(ledger, settings, message)


def altered(casparian: Casparian, statement: str) -> None:
    """Change the database as somebody would who may write the file."""
    path = casparian.folder / "casparian_flow.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        for (trigger,) in database.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
        ).fetchall():
            database.execute(f"DROP TRIGGER {trigger}")
        database.execute(statement)
        database.commit()


def test_every_step_of_a_publish_is_seen_and_a_dry_run_deploys_nothing(
    casparian: Casparian,
) -> None:
    file = casparian.plugin("rows", ROWS)
    done = casparian.run("publish", file, "--version", "1.0.0", "--dry-run")
    steps = [line.split()[0] for line in done.stderr.splitlines()]
    assert steps == [
        "file",
        "plugin",
        "gatekeeper",
        "limits",
        "locked",
        "environment",
        "artifact",
        "signed",
        "checked",
    ]
    assert "nothing was changed" in done.stdout
    assert casparian.json("plugins") == []
    assert casparian.json("audit", "show") == []
    assert "first key" in casparian.out("publish", file, "--version", "1.0.0")
    (own,) = casparian.json("keys", "list")
    assert (own["mine"], own["plugins"], own["standing"]) == (True, "*", "trusted")
    assert own["key_id"][:12] in casparian.out("keys", "list")
    assert own["public_key"] == casparian.out("keys", "generate").strip()


def test_a_second_publisher_is_trusted_first(casparian: Casparian, tmp_path: Path) -> None:
    deploy(casparian, "1.0.0")
    file = casparian.plugin("rows", ROWS + "\n")
    with (
        as_stranger(tmp_path),
        casparian.start("start", "--workers", "0") as daemon,
    ):
        said(daemon, "\n")
        public = casparian.out("keys", "generate").strip()
        words = casparian.err("publish", file, "--version", "1.1.0", code=77)
        assert f"casparian keys trust {public} --owner NAME" in words
        assert "unknown here" in casparian.out("keys", "list")
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate()
    trust = ("keys", "trust", public, "--owner", "Ada", "--plugins", "row*")
    assert "of Ada is trusted with plugins row*" in casparian.out(*trust)
    with as_stranger(tmp_path):
        casparian.run("publish", file, "--version", "1.1.0")
        assert "keys" in casparian.err("keys", "trust", public, "--owner", "A", code=77)
    shown = casparian.json("plugins", "show", "rows")
    assert (shown["version"], shown["owner"], shown["standing"]) == ("1.1.0", "Ada", "trusted")
    (ada,) = [row for row in casparian.json("keys", "list") if row["owner"] == "Ada"]
    casparian.run("keys", "revoke", ada["key_id"][:10], "--reason", "left the company")
    assert "left the company" in casparian.out("plugins", "verify", code=1)
    casparian.run("plugins", "activate", "rows", "1.0.0", "--reason", "back to mine")
    assert casparian.json("plugins", "show", "rows")["version"] == "1.0.0"
    actions = [row["action"] for row in casparian.json("audit", "show")]
    assert actions == ["activate", "revoke-key", "publish", "trust-key", "publish", "trust-key"]


def test_versions_are_shown_compared_disabled_and_brought_back(casparian: Casparian) -> None:
    deploy(casparian, "1.0.0")
    deploy(casparian, "2.0.0", OTHER)
    assert '+MANIFEST = PluginMetadata(pattern="*.text"' in casparian.out(
        "plugins", "diff", "rows", "1.0.0", "2.0.0"
    )
    assert "the same source" in casparian.err("plugins", "diff", "rows", "1.0.0", "1.0.0")
    page = casparian.out("plugins", "show", "rows", "1.0.0", "--source")
    assert 'pattern="*.txt"' in page
    assert "rows-dep==1.0" in page
    assert "none: it may run" in page
    assert "source" not in casparian.json("plugins", "show", "rows")
    assert casparian.json("plugins", "verify", "rows") == [
        {"name": "rows", "version": "1.0.0", "refusal": ""},
        {"name": "rows", "version": "2.0.0", "refusal": ""},
    ]
    casparian.run("plugins", "disable", "rows", "2.0.0", "--reason", "wrong totals")
    assert "may not run: it was disabled: wrong totals" in casparian.out(
        "plugins", "verify", code=1
    )
    assert "no version of plugin rows" in casparian.err("status")
    casparian.run("plugins", "activate", "rows", "1.0.0", "--reason", "2.0.0 is wrong")
    assert [row["version"] for row in casparian.json("plugins", "list") if row["active"]] == [
        "1.0.0"
    ]
    assert "has no version 3" in casparian.err(
        "plugins", "activate", "rows", "3", "--reason", "r", code=66
    )
    about = casparian.json("audit", "show", "--subject", "plugin rows 2*")
    assert [row["action"] for row in about] == ["disable", "publish"]
    assert len(casparian.json("audit", "show", "--limit", "2")) == 2


def test_the_audit_is_checked_against_itself_and_a_noted_head(casparian: Casparian) -> None:
    deploy(casparian, "1.0.0")
    deploy(casparian, "1.1.0")
    noted = casparian.out("audit", "verify").removeprefix("head ").strip()
    assert noted.startswith("5:")
    deploy(casparian, "1.2.0")
    assert casparian.json("audit", "verify", "--head", noted)["problems"] == []
    later = casparian.json("audit", "verify")["head"]
    altered(casparian, "DELETE FROM cf_audit WHERE seq >= 6")
    casparian.run("audit", "verify", "--head", noted)
    cut = casparian.out("audit", "verify", "--head", later, code=1)
    assert "audit row 7" in cut
    altered(casparian, "DELETE FROM cf_audit WHERE seq = 2")
    assert "audit row 2 is missing" in casparian.out("audit", "verify", code=1)
    altered(casparian, "UPDATE cf_audit SET actor = 'nobody' WHERE seq = 3")
    assert "audit row 3" in casparian.out("audit", "verify", code=1)
    for head in ("3", "x:y", f"-1:{'0' * 64}"):
        assert "is not a head" in casparian.err("audit", "verify", "--head", head, code=2)


def test_a_rotated_key_goes_on_publishing(casparian: Casparian) -> None:
    deploy(casparian, "1.0.0")
    before = casparian.out("keys", "generate")
    assert "signs from now on" in casparian.out("keys", "rotate")
    assert casparian.out("keys", "generate") != before
    deploy(casparian, "1.1.0")
    standings = {row["mine"]: row["standing"] for row in casparian.json("keys", "list")}
    assert standings == {True: "trusted", False: "retired"}
    casparian.run("plugins", "verify")
