"""What a person says of a source root, and what is said back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Casparian


def test_the_options_of_a_source_root_can_be_changed(casparian: Casparian, source: Path) -> None:
    (source / "a.csv").write_text("a")
    words = casparian.out("source", "set", "in", "--done-file", "{stem}.ok", "--min-age", "1")
    assert words == "source root in: done_file, min_age_seconds changed\n"
    (root,) = casparian.json("source", "list")
    assert (root["done_file"], root["min_age_seconds"], root["watch"]) == ("{stem}.ok", 1.0, "no")
    casparian.run("source", "set", "in", "--min-age", "0", "--ignore", "*.bak")
    assert "1 file waits for its done file" in casparian.err("scan")
    assert casparian.json("status")["sources"][0]["waiting"] == 1
    (source / "a.ok").write_text("")
    casparian.run("scan")
    assert [row["rel_path"] for row in casparian.json("files")] == ["a.csv"]
    casparian.run("source", "set", "in", "--done-file", "", "--ignore", "")
    (root,) = casparian.json("source", "list")
    assert (root["done_file"], root["ignore"], root["settle_seconds"]) == ("", "", 0.0)
    assert "set-source" in casparian.out("audit", "show")
    assert "no active source root" in casparian.err("source", "set", "x", "--settle", "1", code=66)
    assert "nothing to change" in casparian.err("source", "set", "in", code=66)


@pytest.mark.parametrize("name", ["{name}", "{stem}", "a/{name}", "..", "{other}.done", "x\n"])
def test_what_cannot_name_done_files_is_refused(casparian: Casparian, name: str) -> None:
    assert "done file name" in casparian.err("source", "set", "in", "--done-file", name, code=66)


def test_a_mass_deletion_is_shown_and_believed_when_somebody_says_so(
    casparian: Casparian, source: Path
) -> None:
    for n in range(120):
        (source / str(n)).write_text("1")
    casparian.run("scan")
    for n in range(110):
        (source / str(n)).unlink()
    words = casparian.err("scan", code=3)
    assert "110 files" in words
    assert "casparian scan in --believe-deletions" in words
    assert "110 files" in casparian.err("status")
    assert "110 deleted" in casparian.out("scan", "in", "--believe-deletions")
    assert "110 files" not in casparian.err("status")
    assert "believe-deletions" in casparian.out("audit", "show")


def test_a_scrub_says_what_it_read(casparian: Casparian, source: Path) -> None:
    (source / "a").write_text("1")
    casparian.run("scan")
    assert "scrub     every 7 days" in casparian.out("status")
    words = casparian.out("scan", "--scrub")
    assert "1 file read again" in words
    assert casparian.json("status")["sources"][0]["scrubbed_at"]
