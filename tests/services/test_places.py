"""Where topics go: what a MANIFEST may name, and what a person may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import plugins
from casparian_flow.db.access import Ledger, get_engine, open_ledger
from casparian_flow.db.models import ProcessingJob, TopicConfig
from casparian_flow.errors import ConfigError
from casparian_flow.security.manifest import Manifest, read_manifest
from casparian_flow.services import architect, topics
from casparian_flow.services.scan import scan
from casparian_flow.services.topics import set_topic
from tests.conftest import write_config
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import ROWS, publish, signed


def manifest(sinks: object) -> Manifest:
    source = ROWS.replace('topic="lines"', f"topic='lines', sinks={{'lines': {sinks!r}}}")
    return read_manifest(source.encode(), "rows.py")


def of_manifest(settings: Settings, sinks: object, *roots: Path) -> list[tuple[str, str]]:
    placed = topics.of_manifest(settings, manifest(sinks), [str(root) for root in roots])
    assert {place.topic for place in placed} == {"lines"}
    return [(place.uri, place.mode) for place in placed]


def refused(settings: Settings, sinks: object, *roots: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        of_manifest(settings, sinks, *roots)
    assert "topic 'lines'" in caught.value.message
    assert caught.value.hint
    return caught.value


def test_options_become_modes_and_a_topic_may_have_several_sinks(settings: Settings) -> None:
    several = ["parquet://out?mode=replace", "sqlite:///t.sqlite3", "sqlite:///u?mode=error"]
    assert of_manifest(settings, several) == [
        ("parquet://out", "replace"), ("sqlite:///t.sqlite3", "append"), ("sqlite:///u", "error"),
    ]  # fmt: skip


def test_a_topic_without_a_sink_goes_where_the_configuration_says(tmp_path: Path) -> None:
    """Anywhere: it is a person's word."""
    uri = f"parquet://{tmp_path}/elsewhere"
    settings = write_config(
        tmp_path / "flow", f'[output]\nroots = []\ndefault_uri = "{uri}?mode=replace"\n'
    )
    plain = read_manifest(ROWS.encode(), "rows.py")
    assert topics.of_manifest(settings, plain, []) == [("lines", uri, "replace")]


@pytest.mark.parametrize("same", ["parquet://./out", "parquet://out?mode=error"])
def test_one_sink_twice_would_give_every_row_twice(settings: Settings, same: str) -> None:
    said = refused(settings, ["parquet://out", same]).message
    assert "the same sink" in said


def test_a_manifests_sinks_lie_in_the_output_roots(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    settings = write_config(tmp_path / "flow")
    inside = f"sqlite:///{settings.home}/t.sqlite3"
    assert of_manifest(settings, inside) == [(inside, "append")]
    for away in (f"parquet://{outside}", "parquet://../outside", f"sqlite:///{tmp_path}/flow2"):
        error = refused(settings, ["parquet://out", away])
        assert away in error.message
        assert f"({settings.home})" in error.message
        assert "[output] roots" in error.hint
        assert "casparian topics set" in error.hint
    wider = write_config(tmp_path / "flow", '[output]\nroots = [".", "../outside"]\n')
    assert of_manifest(wider, f"parquet://{outside}/deep") == [
        (f"parquet://{outside}/deep", "append")
    ]
    refused(write_config(tmp_path / "flow", "[output]\nroots = []\n"), "parquet://out")


def test_symlinks_do_not_lead_out_of_the_output_roots(tmp_path: Path) -> None:
    settings = write_config(tmp_path / "flow")
    (tmp_path / "outside").mkdir()
    (settings.home / "way").symlink_to(tmp_path / "outside")
    (settings.home / "out").mkdir()
    (settings.home / "out" / "lines").symlink_to(tmp_path / "outside")
    refused(settings, "parquet://way")
    refused(settings, "sqlite:///way/t.sqlite3")
    refused(settings, "parquet://out")
    (settings.home / "here").symlink_to(settings.home)
    of_manifest(settings, "parquet://here/out2")


def test_topics_that_sql_does_not_tell_apart(settings: Settings) -> None:
    def places_of(uri: str) -> int:
        sinks = f"sinks={{'lines': {uri!r}, 'Lines': {uri!r}}}"
        source = ROWS.replace('topic="lines"', sinks)
        return len(topics.of_manifest(settings, read_manifest(source.encode(), "rows.py"), []))

    assert places_of("parquet://out") == 2
    with pytest.raises(ConfigError, match="'lines' and 'Lines' differ only in case"):
        places_of("sqlite:///t.sqlite3")


def test_variables_are_expanded_from_the_allow_list_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_DIR", "teams/red")
    error = refused(write_config(tmp_path / "flow"), "parquet://${TEAM_DIR}/out?mode=replace")
    assert "the variable TEAM_DIR" in error.message
    assert '[output] env = ["TEAM_DIR"]' in error.hint
    settings = write_config(tmp_path / "flow", '[output]\nenv = ["TEAM_DIR"]\n')
    assert of_manifest(settings, "parquet://${TEAM_DIR}/out?mode=replace") == [
        ("parquet://teams/red/out", "replace")
    ]
    refused(settings, "parquet://${HOME}/out")
    monkeypatch.setenv("TEAM_DIR", str(tmp_path / "outside"))
    assert "outside the folders" in refused(settings, "parquet://${TEAM_DIR}/out").message
    monkeypatch.setenv("TEAM_DIR", "x?mode=error")  # nothing in a value is an option
    assert "is not a valid path" in refused(settings, "parquet://${TEAM_DIR}").message
    for empty in ("", None):
        monkeypatch.delenv("TEAM_DIR")
        if empty is not None:
            monkeypatch.setenv("TEAM_DIR", empty)
        error = refused(settings, "parquet://${TEAM_DIR}/out")
        assert "TEAM_DIR, which is not set" in error.message
        assert "export TEAM_DIR=" in error.hint
        monkeypatch.setenv("TEAM_DIR", "x")


def test_the_ledger_is_no_sink(settings: Settings, ledger: Ledger) -> None:
    os.link(settings.database.path, settings.home / "other name")
    for uri in ("sqlite:///casparian_flow.sqlite3", "sqlite:///other name"):
        with pytest.raises(ConfigError, match="is the ledger itself"):
            of_manifest(settings, uri)
        with pytest.raises(ConfigError, match="is the ledger itself"):
            topics.of_person(settings, "lines", [uri], "append", [])


def test_outputs_neither_hide_a_persons_files_nor_become_input(
    settings: Settings, source: Path
) -> None:
    """Marked names are passed over by scans (docs/adr/0004), also if a person used them first."""
    write_config(settings.home, f'[output]\nroots = ["{source.parent}"]\n')
    settings = write_config(settings.home, f'[output]\nroots = ["{source.parent}"]\n')
    of_manifest(settings, f"parquet://{source}", source)  # nothing is there of that name
    (source / "lines").mkdir()
    said = refused(settings, f"parquet://{source}", source).message
    assert f"{source}/lines already exists in the source root {source}" in said
    durable.own(source, "lines")
    of_manifest(settings, f"parquet://{source}", source)  # it is ours
    (source / "data.db").write_bytes(b"")
    assert (
        "scans would ignore it" in refused(settings, f"sqlite:///{source}/data.db", source).message
    )
    said = refused(settings, f"parquet://{source}", source / "lines").message
    assert "its outputs would be read as input" in said
    with pytest.raises(ConfigError, match="would be read as input"):
        topics.of_person(settings, "lines", [f"parquet://{source}"], "append", [f"{source}/lines"])


def test_what_the_manifest_says_is_what_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed, deployed and read back: as written in the plugin, expanded in the table."""
    monkeypatch.setenv("TEAM_DIR", "red")
    settings = write_config(tmp_path / "flow", '[output]\nenv = ["TEAM_DIR"]\n')
    said = ["parquet://${TEAM_DIR}/out?mode=replace", "sqlite:///t.sqlite3"]
    source = ROWS.replace('topic="lines"', f"sinks={{'lines': {said!r}}}")
    with open_ledger(settings.database) as ledger:
        architect.deploy(ledger, settings, signed(ledger, tmp_path / "keys", source))
        monkeypatch.setenv("TEAM_DIR", "blue")
        rows = ledger.read(plugins.topics)["rows"]
        assert [(row.uri, row.mode) for row in rows] == [
            ("parquet://red/out", "replace"), ("sqlite:///t.sqlite3", "append"),
        ]  # fmt: skip
        (plugin,) = ledger.read(plugins.stored)
        assert plugins.manifest_of(plugin.manifest).sinks_of("lines") == said


@pytest.mark.slow
def test_a_new_version_that_names_other_sinks_says_that_its_topics_stay(
    tmp_path: Path, settings: Settings
) -> None:
    def saying(sinks: list[str]) -> str:
        return ROWS.replace('topic="lines"', f"sinks={{'lines': {sinks!r}}}")

    def deployed(source: str, version: str) -> str:
        message = signed(ledger, tmp_path / "keys", source, version=version)
        return architect.deploy(ledger, settings, message)

    with open_ledger(settings.database) as ledger:
        assert "topics set" not in deployed(saying(["parquet://a", "sqlite:///b"]), "1.0.0")
        assert "topics set" not in deployed(saying(["sqlite:///b", "parquet://./a/"]), "1.0.1")
        assert deployed(saying(["parquet://a b?mode=replace"]), "1.0.2").splitlines()[1:] == [
            "topic lines still goes to parquet://a?mode=append, sqlite:///b?mode=append, "
            "not to the MANIFEST's sink; to use that: "
            "casparian topics set rows lines 'parquet://a b?mode=replace'"
        ]
        assert "topics set" not in deployed(ROWS, "1.0.3")
        with Session(get_engine(ledger.database)) as db:
            db.query(TopicConfig).delete()
            uri = "parquet://a b?mode=replace"
            db.add(TopicConfig(plugin_name="rows", topic_name="lines", uri=uri))
            db.commit()
        assert "topics set" not in deployed(saying([uri]), "1.0.4")


@pytest.mark.slow
def test_what_people_write_into_the_table_works(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    """With or without `?mode=`; a mode behind the URI wins over the column's default."""
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    with Session(get_engine(ledger.database)) as db:
        db.query(TopicConfig).delete()
        for uri in ("parquet://out?mode=append", "sqlite:///t.sqlite3"):
            db.add(TopicConfig(plugin_name="rows", topic_name="lines", uri=uri))
        db.commit()
        (source / "a.txt").write_text("one\ntwo")
        scan(ledger, root)
        assert work_off(settings) == {"COMPLETED": 1}
        assert len(list((settings.home / "out" / "lines").glob("*.parquet"))) == 1
        assert (settings.home / "t.sqlite3").exists()
        second = db.query(TopicConfig).filter_by(uri="sqlite:///t.sqlite3").one()
        for number, (uri, said) in enumerate(
            {
                "sqlite:///t.sqlite3?mood=append": "has no option 'mood'",
                "parquet://out": "topic 'lines' goes to parquet://out twice",
                "sqlite:///casparian_flow.sqlite3": "is the ledger itself",
            }.items()
        ):
            second.uri = uri
            db.commit()
            (source / f"b{number}.txt").write_text(uri)
            scan(ledger, root)
            assert work_off(settings) == {"COMPLETED": 1, "FAILED": number + 1}
            failed = db.query(ProcessingJob).order_by(ProcessingJob.id.desc()).first()
            assert failed
            assert said in failed.reason


@pytest.mark.slow
def test_a_person_is_told_what_stays(ledger: Ledger, settings: Settings, source: Path) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("one\ntwo")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}

    def stays(*uris: str, mode: str = "append") -> list[str]:
        return set_topic(ledger, settings, "rows", "lines", uris, mode).notes

    assert stays("parquet://output", "sqlite:///t.sqlite3") == []
    assert stays("sqlite:///t.sqlite3") == ["1 output (2 rows) stays in parquet://output"]
    assert stays("parquet://output?mode=replace") == []
    assert stays("parquet://output", mode="error") == []
    with pytest.raises(ConfigError, match="there is no mode 'upsert'"):
        stays("parquet://output", mode="upsert")
    with pytest.raises(ConfigError, match="the same sink"):
        stays("parquet://output", f"parquet://{settings.home}/output")
