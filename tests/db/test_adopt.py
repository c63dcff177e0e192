"""Outputs that sinks have become rows of a ledger that was lost, or is older than its sinks."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, text

from casparian_flow.config import Settings
from casparian_flow.db import adopt, asked, jobs, plugins, trust
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.adopt import Adoption
from casparian_flow.db.models import ProcessingJob
from casparian_flow.db.routing import JobRequest
from casparian_flow.db.states import JobStatus
from casparian_flow.engine.dispatch import Dispatcher
from casparian_flow.errors import ArtifactRefused, PublishConflict
from casparian_flow.protocol import Output, State, key_of
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.verify import check_ledger
from tests.conftest import write_config
from tests.factories import add_plugin, add_root
from tests.plugs import OTHER, ROWS, publish

SINK, OTHER_SINK = "parquet:///sink", "parquet:///other"


def sha(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def output(
    content: str, ordinal: int = 1, *, path: bytes = b"a.txt", version_id: int = 1,
    job_id: int = 1, artifact: str = "A", topic: str = "lines", **facts: Any,
) -> Output:  # fmt: skip
    """An output as a sink records it."""
    values = {
        "uri": SINK, "location": SINK, "mode": "append", "source": "source", "plugin": "rows",
        "plugin_version": "1.0.0", "topics": "lines", "target": f"/sink/{content}", "rows": 1,
        "size_bytes": 9, "digest": sha("digest"), "state": State.CURRENT,
        "shown_at": "2026-01-02T03:04:05.000006Z", **facts,
    }  # fmt: skip
    key = key_of(values["source"], path, sha(content), str(ordinal), artifact, topic, values["uri"])
    return Output(
        output_key=key, topic=topic, path=path, ordinal=ordinal, content_hash=sha(content),
        file_bytes=len(content), artifact_hash=artifact, version_id=version_id, job_id=job_id,
        **values,
    )  # fmt: skip


def take(ledger: Ledger, *found: Output, doubted: tuple[str, ...] = ()) -> list[Adoption]:
    return ledger.write(lambda c: adopt.adopt(c, found, doubted))


def rows(ledger: Ledger, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in ledger.read(lambda c: c.execute(text(query)).all())]


def versions(ledger: Ledger) -> list[tuple[Any, ...]]:
    return rows(
        ledger,
        "SELECT v.id, l.rel_path, v.ordinal, v.content_hash FROM cf_file_version v "
        "JOIN cf_file_location l ON l.id = v.location_id ORDER BY v.id",
    )


def states(ledger: Ledger) -> dict[str, tuple[str, str]]:
    """Target -> what readers are to see of it, and what the sink was told."""
    query = (
        "SELECT o.target, s.state, s.told FROM cf_output o "
        "JOIN cf_visibility s ON s.output_id = o.id WHERE o.state = 'PUBLISHED'"
    )
    return {target.rpartition("/")[2]: (state, told) for target, state, told in rows(ledger, query)}


def statuses(ledger: Ledger) -> dict[int, str]:
    return dict(rows(ledger, "SELECT id, status FROM cf_processing_queue"))


def problems(ledger: Ledger) -> list[str]:
    return ledger.read(lambda c: check_ledger(c)[0].problems)


@pytest.fixture
def root(ledger: Ledger, source: Path) -> Root:
    return add_root(ledger, source)


def test_a_lost_ledger_gets_its_rows_back(ledger: Ledger, root: Root) -> None:
    adopted = take(
        ledger,
        output("a1", 1, version_id=3, job_id=7, state=State.PAST),
        output("a2", 2, version_id=5, job_id=8),
        output("b1", 1, path=b"deep/er/b.txt", version_id=4, job_id=9),
    )
    assert [(one.location, one.outputs, one.rows) for one in adopted] == [(SINK, 3, 3)]
    assert versions(ledger) == [
        (3, "a.txt", 1, sha("a1")), (4, "deep/er/b.txt", 1, sha("b1")), (5, "a.txt", 2, sha("a2")),
    ]  # fmt: skip
    assert statuses(ledger) == dict.fromkeys((7, 8, 9), "COMPLETED")
    assert states(ledger) == {
        "a1": ("past", "past/append"), "a2": ("current", "current/append"),
        "b1": ("current", "current/append"),
    }  # fmt: skip
    assert rows(ledger, "SELECT published_at FROM cf_output LIMIT 1") == [
        ("2026-01-02 03:04:05.000006",)
    ]
    assert rows(ledger, "SELECT action, subject FROM cf_audit WHERE action <> 'seal'") == [
        ("adopt", f"sink {SINK}")
    ]
    assert problems(ledger) == []
    assert take(ledger, output("a2", 2, version_id=5, job_id=8)) == []


def test_a_scan_finds_the_adopted_content_and_goes_on_from_it(
    ledger: Ledger, root: Root, source: Path
) -> None:
    take(
        ledger,
        output("a1", 2, version_id=3, job_id=7),
        output("b1", 1, path=b"deep/b.txt", version_id=4, job_id=9),
        output("c1", 1, path=b"c.txt", version_id=6, job_id=2),
        output("z", source="elsewhere", version_id=90, job_id=70),
    )
    (source / "deep").mkdir()
    (source / "deep" / "b.txt").write_text("b1")
    (source / "a.txt").write_text("a2")
    assert scan(ledger, root).versions == 1
    assert (91, "a.txt", 3, sha("a2")) in versions(ledger)
    query = "SELECT rel_path, gone_at IS NULL FROM cf_file_location ORDER BY rel_path"
    assert rows(ledger, query) == [("a.txt", 1), ("c.txt", 0), ("deep/b.txt", 1)]
    assert problems(ledger) == []


def test_an_older_ledger_learns_what_came_after_it(
    ledger: Ledger, root: Root, source: Path
) -> None:
    (source / "a.txt").write_text("a1")
    plugin = add_plugin(ledger, "rows", subscriptions="t")
    scan(ledger, root)
    (version,) = (row[0] for row in versions(ledger))
    queued = ledger.write(
        lambda c: jobs.enqueue(c, [(version, JobRequest(plugin, "rows", 0))], "2026-01-01 00:00:00")
    )
    first = output("a1", version_id=version, job_id=queued[0], artifact="rows-1.0.0")
    take(ledger, first)
    assert statuses(ledger) == {queued[0]: "COMPLETED"}
    (source / "a.txt").write_text("a3")
    scan_before = versions(ledger)
    assert len(scan_before) == 1
    take(
        ledger,
        output("a3", 4, version_id=9, job_id=8, plugin_version="2.0.0"),
        output("a2", 2, version_id=6, job_id=5, artifact="rows-1.0.0", state=State.PAST),
    )
    assert scan(ledger, root).versions == 0
    assert [row[0] for row in versions(ledger)] == [version, 6, 9]
    assert states(ledger) == {
        "a1": ("past", ""), "a2": ("past", "past/append"), "a3": ("current", "current/append"),
    }  # fmt: skip
    assert [p for p in problems(ledger) if not p.startswith("plugin rows 1.0.0")] == []


def test_an_id_that_names_something_else_is_given_anew(
    ledger: Ledger, root: Root, source: Path
) -> None:
    (source / "other.txt").write_text("here before")
    scan(ledger, root)
    ((mine, *_),) = versions(ledger)
    take(
        ledger,
        output("a1", version_id=mine, job_id=4),
        output("b1", path=b"b.txt", version_id=20, job_id=4),
    )
    named = {path: number for number, path, *_ in versions(ledger)}
    assert named == {"other.txt": mine, "a.txt": 21, "b.txt": 20}
    assert sorted(statuses(ledger)) == [4, 5]
    assert problems(ledger) == []


def test_versions_that_were_numbered_before_the_sink_was_known_come_last(
    ledger: Ledger, root: Root, source: Path
) -> None:
    for name, words in {"a": "a2", "b": "b9", "c": "c1"}.items():
        (source / f"{name}.txt").write_text(words)
    scan(ledger, root)
    numbers = {path: number for number, path, *_ in versions(ledger)}
    plugin = add_plugin(ledger, "rows", subscriptions="t")
    pairs = [(number, JobRequest(plugin, "rows", 0)) for number in numbers.values()]
    queued = ledger.write(lambda c: jobs.enqueue(c, pairs, "2026-01-01 00:00:00"))
    take(
        ledger,
        *(
            output(words, n, path=f"{words[0]}.txt".encode(), version_id=10 * n, job_id=job,
                   artifact="rows-1.0.0")
            for job, (words, n) in enumerate(
                {"a1": 1, "a2": 2, "b1": 1, "b2": 2, "c1": 1}.items(), start=11)
        ),
    )  # fmt: skip
    contents = {
        path: [row[3] for row in sorted(versions(ledger), key=lambda r: r[2]) if row[1] == path]
        for path in numbers
    }
    assert contents == {
        "a.txt": [sha("a2"), sha("a1"), sha("a2")],
        "b.txt": [sha("b9"), sha("b1"), sha("b2"), sha("b9")],
        "c.txt": [sha("c1")],
    }
    assert scan(ledger, root).versions == 0
    waiting = ledger.read(
        lambda c: c.execute(
            text(
                "SELECT v.content_hash, v.ordinal FROM cf_processing_queue j "
                "JOIN cf_file_version v ON v.id = j.file_version_id WHERE j.status = 'QUEUED'"
            )
        ).all()
    )
    assert waiting == [(sha("b9"), 4)]
    assert sorted(statuses(ledger)[n] for n in queued) == ["COMPLETED", "SUPERSEDED", "SUPERSEDED"]
    assert [p for p in problems(ledger) if not p.startswith("plugin rows")] == []


def test_outputs_of_a_source_root_wait_until_it_is_added(ledger: Ledger, tmp_path: Path) -> None:
    found = output("a1", version_id=40, job_id=30)
    assert take(ledger, found) == []
    assert rows(ledger, "SELECT version_id, job_id FROM cf_id_floor") == [(40, 30)]
    for name in ("other", "source"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.do").write_text(name)
    other = add_root(ledger, tmp_path / "other")
    scan(ledger, other)
    add_root(ledger, tmp_path / "source")
    assert [one.outputs for one in take(ledger, found)] == [1]
    assert [row[:2] for row in versions(ledger)] == [(40, "a.txt"), (41, "f.do")]


@pytest.mark.parametrize("status", JobStatus)
def test_a_job_whose_outputs_the_sink_has_need_not_run(
    ledger: Ledger, root: Root, source: Path, status: JobStatus
) -> None:
    (source / "a.txt").write_text("a1")
    scan(ledger, root)
    plugin = add_plugin(ledger, "rows")
    worker = "w" if status == JobStatus.RUNNING else None

    def queue(connection: Connection) -> int:
        values = {
            "file_version_id": 1, "plugin_id": plugin, "plugin_name": "rows", "status": status,
            "worker": worker,
        }  # fmt: skip
        made = insert(ProcessingJob).values(values).returning(ProcessingJob.id)
        return connection.execute(made).scalar_one()

    job = ledger.write(queue)
    take(ledger, output("a1", job_id=77, artifact="rows-1.0.0"))
    busy = status in (JobStatus.RUNNING, JobStatus.COMMITTING)
    assert statuses(ledger) == {job: status if busy else "COMPLETED"}
    assert len(states(ledger)) == (0 if busy else 1)


def test_a_job_without_published_outputs_cannot_be_completed(ledger: Ledger, root: Root) -> None:
    take(ledger, output("a1"))
    again = "UPDATE cf_processing_queue SET status = 'QUEUED'"
    ledger.write(lambda c: c.execute(text(again)))
    ledger.write(
        lambda c: c.execute(text("UPDATE cf_output SET state = 'PLANNED', published_at = NULL"))
    )
    with pytest.raises(sqlite3.IntegrityError, match="not complete"):
        ledger.write(lambda c: jobs.take_over(c, [1]))


def test_what_was_published_hidden_in_one_store_only_is_to_be_made_again(
    ledger: Ledger, root: Root
) -> None:
    part = output(
        "a1", topics="lines/more", state=State.HIDDEN, shown_at="", version_id=8, job_id=6
    )
    assert take(ledger, part) == []
    assert rows(ledger, "SELECT version_id, job_id FROM cf_id_floor") == [(8, 6)]
    more = msgspec.structs.replace(
        part, topic="more", output_key="k", location=OTHER_SINK, uri=OTHER_SINK, rows=0, target=""
    )
    assert {one.location for one in take(ledger, part, more)} == {SINK, OTHER_SINK}
    assert states(ledger)["a1"] == ("current", "hidden/append")


def test_retractions_made_since_are_adopted(ledger: Ledger, root: Root) -> None:
    one, two = output("a1", job_id=1), output("b1", path=b"b.txt", version_id=2, job_id=2)
    take(ledger, one, msgspec.structs.replace(two, state=State.RETRACTED))
    assert states(ledger)["b1"] == ("retracted", "retracted/append")
    gone = msgspec.structs.replace(one, state=State.RETRACTED)
    take(ledger, gone)
    assert states(ledger)["a1"] == ("current", "current/append")
    take(ledger, gone, doubted=(SINK,))
    assert states(ledger)["a1"] == ("retracted", "retracted/append")
    # A person has undone it, and the sink was not told yet.
    ledger.write(lambda c: c.execute(text("DELETE FROM cf_retracted_version")))
    take(ledger, gone, doubted=(SINK,))
    assert rows(ledger, "SELECT * FROM cf_retracted_version") == []


def test_of_two_artifacts_the_later_one_stands_and_the_other_is_told(
    ledger: Ledger, root: Root
) -> None:
    take(
        ledger,
        output("new", 1, artifact="B", plugin_version="1.0.1", job_id=5, target="/sink/bad"),
        output("new", 1, artifact="A", plugin_version="1.0.0", job_id=2, target="/sink/good"),
    )
    assert states(ledger) == {
        "bad": ("current", "current/append"), "good": ("hidden", "current/append"),
    }  # fmt: skip
    assert rows(ledger, "SELECT version FROM cf_plugin ORDER BY id") == [("1.0.0",), ("1.0.1",)]


def test_a_stub_may_not_run_and_becomes_the_plugin_when_it_is_published(
    settings: Settings, ledger: Ledger, root: Root, source: Path
) -> None:
    (source / "a.txt").write_text("a1")
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (stored,) = ledger.read(plugins.stored)
    other = write_config(source.parent / "second")
    with open_ledger(other.database) as new:
        root = add_root(new, source)
        take(new, output("a1", artifact=stored.artifact_hash, job_id=3))
        (stub,) = new.read(plugins.stored)
        assert problems(new) == []
        assert "publish it again" in plugins.refusal(stub, new.read(trust.read))
        with pytest.raises(ArtifactRefused, match="publish it again"):
            plugins.manifest_of(stub.manifest)
        assert new.read(plugins.only_adopted) == ["rows"]
        with pytest.raises(PublishConflict, match="other content gave") as refused:
            publish(new, other, "rows", OTHER, "1.0.0")
        assert "--version 1.0.1" in refused.value.hint
        publish(new, other, "rows", ROWS, "1.0.0")
        (whole,) = new.read(plugins.stored)
        assert (whole.id, whole.source) == (stub.id, ROWS.encode())
        assert new.read(plugins.only_adopted) == []
        assert scan(new, root).job_ids == []
        assert statuses(new) == {3: "COMPLETED"}
        assert problems(new) == []
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            new.write(lambda c: plugins.complete(c, whole.id, source=b""))


def test_a_plugin_that_was_emptied_is_no_stub(
    settings: Settings, ledger: Ledger, root: Root
) -> None:
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (stored,) = ledger.read(plugins.stored)
    take(ledger, output("a1", artifact=stored.artifact_hash))
    ledger.write(lambda c: c.execute(text("DROP TRIGGER cf_plugin_no_update")))
    ledger.write(
        lambda c: c.execute(
            text("UPDATE cf_plugin SET manifest = '', source = x'', statement = NULL")
        )
    )
    assert any(problem.startswith("plugin rows 1.0.0") for problem in problems(ledger))


def test_other_bytes_under_the_same_version_keep_their_own_stub(ledger: Ledger, root: Root) -> None:
    add_plugin(ledger, "rows")
    take(ledger, output("a1", artifact=sha("other bytes")))
    assert rows(ledger, "SELECT version FROM cf_plugin ORDER BY id") == [
        ("1.0.0",), (f"1.0.0+{sha('other bytes')[:12]}",),
    ]  # fmt: skip


def test_no_job_is_claimed_for_a_sink_that_was_not_asked(
    settings: Settings, ledger: Ledger, root: Root, source: Path
) -> None:
    (source / "a.txt").write_text("a1")
    scan(ledger, root)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    dispatcher = Dispatcher(settings, ledger.write(plugins.begin_epoch))
    (location,) = rows(ledger, "SELECT uri FROM cf_topic_config")[0]
    place = f"parquet://{settings.home / location.removeprefix('parquet://')}"

    def claimed() -> int:
        return len(ledger.write(lambda c: dispatcher.claim(c, "w", 9, frozenset())))

    assert claimed() == 0
    ledger.write(lambda c: asked.note(c, [], {place: "it is away"}, doubt=False))
    assert claimed() == 0
    assert ledger.read(asked.unknown) == {place: "it is away"}
    ledger.write(lambda c: asked.note(c, [place], {}, doubt=False))
    assert claimed() == 1


def test_a_ledger_that_is_older_than_its_sinks_doubts_what_it_knows(
    ledger: Ledger, root: Root, tmp_path: Path
) -> None:
    def note(connection: Connection) -> None:
        asked.note(connection, [SINK], {}, doubt=False)

    assert ledger.read(lambda c: asked.is_doubtful(c, None))
    ledger.write(note)
    ledger.write(plugins.begin_epoch)
    beside = ledger.read(asked.mark)
    assert not ledger.read(lambda c: asked.is_doubtful(c, beside))
    assert ledger.read(lambda c: asked.is_doubtful(c, beside._replace(epoch=beside.epoch + 1)))
    assert ledger.read(lambda c: asked.is_doubtful(c, beside._replace(ledger_id="another")))
    ledger.write(lambda c: asked.note(c, [], {SINK: "it is away"}, doubt=False))
    assert ledger.read(asked.known) == {SINK}
    ledger.write(lambda c: asked.note(c, [], {SINK: "it is away"}, doubt=True))
    assert ledger.read(asked.known) == set()
    ledger.write(note)
    take(ledger, output("a1"))
    ledger.copy(tmp_path / "copy")
    ledger.write(asked.doubt)
    assert ledger.read(asked.known) == set()
    assert states(ledger) == {"a1": ("current", "")}
