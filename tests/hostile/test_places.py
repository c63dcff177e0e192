"""No topic goes where something of ours is, or where SQLite keeps its side files."""

from __future__ import annotations

import os
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db import plugins
from casparian_flow.db.access import Ledger, get_engine
from casparian_flow.db.models import ProcessingJob, TopicConfig
from casparian_flow.errors import ConfigError
from casparian_flow.security.manifest import read_manifest
from casparian_flow.services import topics
from casparian_flow.services.scan import scan
from casparian_flow.services.topics import set_topic
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import ROWS, publish

SQLITE = [
    "casparian_flow.sqlite3-journal",
    "casparian_flow.sqlite3-wal",
    "./casparian_flow.sqlite3-shm",
    "output/../casparian_flow.sqlite3-journal",
    "{home}/casparian_flow.sqlite3-journal",
    "link/casparian_flow.sqlite3-journal",
    "to-journal",
    "CASPARIAN_FLOW.SQLITE3-JOURNAL",
    "other.db-journal",
    "other.db-WAL",
    "output/fresh-shm",
    "casparian_flow.sqlite3-journal/x.db",
    "other.db-wal/deeper/x.db",
    "casparian_flow.sqlite3",
    "link/./casparian_flow.sqlite3",
    "global_config.toml",
    "Global_Config.toml",
    "link/global_config.toml",
    "to-config",
    "output/global_config.toml",
    "blocked.db",
    "notes.txt",
    "pipe.db",
    "/proc/self/fd/3",
    "/proc/self/cwd/x.db",
    "/proc/1/root/tmp/x.db",
    "/dev/null",
    "/dev/fd/3",
    "notes.txt/x.db",
    "to-state/casparian_flow.sqlite3.gate",
    ".Casparian/x.db",
    "{keys}/x.db",
    "{cache}/x.db",
    "{runtime}/x.db",
    "to-keys/x.db",
]
PARQUET = [
    ("casparian_flow.sqlite3-journal", "lines"),
    (".", "casparian_flow.sqlite3-journal"),
    (".", "casparian_flow.sqlite3"),
    ("link", "casparian_flow.sqlite3-wal"),
    (".", "global_config.toml"),
    (".", "other.db-journal"),
    ("other.db-journal", "lines"),
    ("other.db-shm/deeper", "lines"),
    ("notes.txt", "lines"),
    (".", "notes.txt"),
    ("{parent}", "{name}"),
    ("{keys}", "lines"),
    ("{cache}/envs", "lines"),
    ("to-keys", "lines"),
    ("to-state", "lines"),
    ("/proc/self/cwd", "lines"),
    ("/proc/1/root/tmp", "lines"),
]
FINE = [
    ("sqlite:///tables.sqlite3", "lines"),
    ("sqlite:///other.db", "lines"),
    ("sqlite:///general-journal.db", "lines"),
    ("sqlite:///output/wal", "lines"),
    ("sqlite:///empty", "lines"),
    ("parquet://general-journal", "lines"),
    ("parquet://output", "general-journal"),
    ("parquet://link/output", "lines"),
    ("parquet://.", "lines"),
]


@pytest.fixture
def laid(settings: Settings, ledger: Ledger) -> Settings:
    """The folder of a configuration, with links and files that a sink could meet."""
    home = settings.home
    (home / "link").symlink_to(home)
    (home / "to-journal").symlink_to(f"{settings.database.path}-journal")
    (home / "to-config").symlink_to(home / "global_config.toml")
    (home / "to-state").symlink_to(settings.database.state_folder)
    (home / "to-keys").symlink_to(config.keys_folder())
    (home / "notes.txt").write_text("mine\n")
    (home / "empty").touch()
    os.mkfifo(home / "pipe.db")
    (home / "blocked.db-journal").mkdir()
    with closing(sqlite3.connect(home / "other.db")) as database:
        database.execute("CREATE TABLE t (n)")
    return settings


def filled(text: str, settings: Settings) -> str:
    return text.format(
        home=settings.home, parent=settings.home.parent, name=settings.home.name,
        keys=config.keys_folder(), cache=config.cache_folder(), runtime=config.runtime_folder(),
    )  # fmt: skip


def declared(settings: Settings, uri: str, topic: str) -> list[topics.TopicSink]:
    source = ROWS.replace('topic="lines"', f"sinks={{{topic!r}: {uri!r}}}")
    return topics.of_manifest(settings, read_manifest(source.encode(), "rows.py"), [])


def refused(settings: Settings, uri: str, topic: str) -> None:
    with pytest.raises(ConfigError) as caught:
        declared(settings, uri, topic)
    assert caught.value.hint
    with pytest.raises(ConfigError) as again:
        topics.of_person(settings, topic, [uri], "append", [])
    assert again.value.message == caught.value.message
    assert "outside the folders" not in caught.value.message


@pytest.mark.parametrize("path", SQLITE)
def test_a_database_that_would_be_in_the_way_is_refused(laid: Settings, path: str) -> None:
    refused(laid, f"sqlite:///{filled(path, laid)}", "lines")


@pytest.mark.parametrize(("folder", "topic"), PARQUET)
def test_a_folder_that_would_be_in_the_way_is_refused(
    laid: Settings, folder: str, topic: str
) -> None:
    refused(laid, f"parquet://{filled(folder, laid)}", filled(topic, laid))


@pytest.mark.parametrize(("uri", "topic"), FINE)
def test_a_place_that_only_looks_like_one_is_taken(laid: Settings, uri: str, topic: str) -> None:
    assert declared(laid, uri, topic)
    assert topics.of_person(laid, topic, [uri], "append", [])


def test_who_sets_a_topic_or_edits_the_table_is_refused_as_well(
    laid: Settings, ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, laid, "rows", ROWS, "1.0.0")
    before = ledger.read(plugins.topics)
    with pytest.raises(ConfigError, match="-wal"):
        set_topic(ledger, laid, "rows", "lines", ["sqlite:///t.sqlite3-wal"], "append")
    assert ledger.read(plugins.topics) == before
    bad = ("sqlite:///casparian_flow.sqlite3-journal", "sqlite:///to-config", "parquet://to-keys")
    with ExitStack() as stack:
        engine = get_engine(laid.database)
        stack.callback(engine.dispose)
        db = stack.enter_context(Session(engine))
        topic = db.query(TopicConfig).one()
        for number, uri in enumerate(bad, start=1):
            topic.uri = uri
            db.commit()
            (source / f"{number}.txt").write_text(uri)
            scan(ledger, root)
            assert work_off(laid) == {"FAILED": number}
            failed = db.query(ProcessingJob).order_by(ProcessingJob.id.desc()).first()
            assert failed
            assert "topic 'lines' cannot go to" in failed.reason
