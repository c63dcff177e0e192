"""Assignments: what a worker is told of a job, attempt after attempt."""

from __future__ import annotations

from pathlib import Path

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db import jobs, plugins
from casparian_flow.db.access import Ledger
from casparian_flow.engine.dispatch import Dispatcher
from casparian_flow.protocol import Assignment
from casparian_flow.services import architect
from casparian_flow.services.scan import scan
from tests.factories import add_root
from tests.plugs import signed


def test_every_attempt_has_the_same_output_key(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    architect.deploy(ledger, settings, signed(ledger, config.keys_folder()))
    (source / "a.txt").write_text("one")
    scan(ledger, root)

    def attempt() -> Assignment:
        dispatcher = Dispatcher(settings, ledger.write(plugins.begin_epoch))
        (job,) = ledger.write(lambda c: dispatcher.claim(c, "w", 1, frozenset()))
        ledger.write(lambda c: jobs.requeue(c, job.job_id, job.fence, reason="again"))
        return job

    first, second = attempt(), attempt()
    assert first.attempt != second.attempt
    assert [o.output_key for o in first.outputs] == [o.output_key for o in second.outputs]


def test_the_versions_of_a_location_share_a_slot(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    architect.deploy(ledger, settings, signed(ledger, config.keys_folder()))
    for content in ("one", "two"):
        for name in ("a.txt", "b.txt"):
            (source / name).write_text(content)
        scan(ledger, root)
    dispatcher = Dispatcher(settings, ledger.write(plugins.begin_epoch))
    jobs = ledger.write(lambda c: dispatcher.claim(c, "w", 9, frozenset()))
    slots = {(job.rel_path, o.ordinal): o.location_slot for job in jobs for o in job.outputs}
    assert slots.keys() == {(name, n) for name in ("a.txt", "b.txt") for n in (1, 2)}
    assert slots["a.txt", 1] == slots["a.txt", 2] != slots["b.txt", 1] == slots["b.txt", 2]
    assert len({o.output_key for job in jobs for o in job.outputs}) == len(slots)
