"""Trust in a daemon that runs: what may not run does not, says so in its jobs, and comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import audit, jobs, plugins, views
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.models import FileVersion
from casparian_flow.db.routing import JobRequest
from casparian_flow.db.states import utcnow
from casparian_flow.main import Daemon
from casparian_flow.security import keys as key_files
from casparian_flow.security.signing import key_id
from casparian_flow.services import architect
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services import keys as key_verbs
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.verify import verify
from tests.daemons import all_done, outcomes, work_off
from tests.factories import add_root
from tests.plugs import ROWS, publish

pytestmark = pytest.mark.usefixtures("own_keys")


@pytest.fixture
def root(ledger: Ledger, source: Path) -> Root:
    return add_root(ledger, source)


def own_key() -> str:
    return key_id(key_files.local_key(config.keys_folder()).verify_key.encode())


def tamper(ledger: Ledger) -> None:
    def work(connection: Connection) -> None:
        connection.execute(text("DROP TRIGGER cf_plugin_no_update"))
        connection.execute(text("UPDATE cf_plugin SET source = source || CAST('#' AS BLOB)"))

    ledger.write(work)


def disable(ledger: Ledger, settings: Settings) -> None:
    plugins.disable(ledger, config.keys_folder(), "rows", "1.0.0", "wrong totals")


def revoke(ledger: Ledger, settings: Settings) -> None:
    old = own_key()
    key_verbs.rotate(ledger, config.keys_folder())
    key_verbs.revoke(ledger, config.keys_folder(), old, "laptop stolen")


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (disable, "it was disabled: wrong totals"),
        (revoke, "was revoked: laptop stolen"),
        (lambda ledger, settings: tamper(ledger), "its artifact hash"),
    ],
    ids=["disabled", "revoked", "tampered"],
)
def test_a_job_that_waits_for_what_may_not_run_fails_and_says_why(
    ledger: Ledger, settings: Settings, source: Path, root: Root,
    stop: Callable[[Ledger, Settings], None], words: str,
) -> None:  # fmt: skip
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("one\n")
    scan(ledger, root)
    stop(ledger, settings)
    assert work_off(settings) == {"FAILED": 1}
    reason = outcomes(ledger)["a.txt"][1]
    assert reason.startswith("plugin rows 1.0.0 may not run: ")
    assert words in reason
    (row,) = ledger.read(lambda c: views.audit(c, 1, "job *"))
    assert row["action"] == "fail"
    assert words in json.loads(row["detail"])["reason"]
    job = ledger.read(lambda c: views.job(c, 1))
    assert job
    assert len(job["attempt_log"]) == 1  # permanent: no second attempt
    assert job["outputs"] == []


def test_a_warm_guest_runs_nothing_more_once_its_version_is_disabled(
    ledger: Ledger, settings: Settings, source: Path, root: Root
) -> None:
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    folder = config.keys_folder()

    def queue(connection: Connection) -> None:
        """What a scan would have queued an instant before the version was disabled."""
        version = connection.execute(select(func.max(FileVersion.id))).scalar_one()
        plugin = plugins.find(connection, "rows", "1.0.0")
        pairs = [(version, JobRequest(plugin.id, "rows", 0))]
        jobs.enqueue(connection, pairs, utcnow().isoformat())

    async def look(name: str) -> None:
        (source / name).write_text(f"{name}\n")
        await asyncio.to_thread(scan, ledger, root)

    async def work(daemon: Daemon) -> dict[str, int]:
        await asyncio.to_thread(ledger.wake)
        return await all_done(daemon)

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await look("a.txt")
            assert await work(daemon) == {"COMPLETED": 1}
            await asyncio.to_thread(plugins.disable, ledger, folder, "rows", None, "wrong totals")
            await look("b.txt")
            assert await work(daemon) == {"COMPLETED": 1}  # nothing is routed to it
            await ledger.write_soon(queue)
            assert await work(daemon) == {"COMPLETED": 1, "FAILED": 1}
            assert "it was disabled: wrong totals" in outcomes(ledger)["b.txt"][1]
            await asyncio.to_thread(
                architect.activate, ledger, settings, folder, "rows", "1.0.0", "was right"
            )
            await asyncio.to_thread(job_verbs.retry, ledger, None)
            assert await work(daemon) == {"COMPLETED": 2}

    asyncio.run(story())
    assert ledger.read(lambda c: list(audit.problems(c))) == []
    assert verify(settings, ledger).problems == []


def test_files_that_came_while_nothing_was_active_get_their_jobs_afterwards(
    ledger: Ledger, settings: Settings, source: Path, root: Root
) -> None:
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    publish(ledger, settings, "rows", ROWS + "\n", "2.0.0")
    folder = config.keys_folder()
    plugins.disable(ledger, folder, "rows", "2.0.0", "wrong totals")
    (source / "a.txt").write_text("one\n")
    scan(ledger, root)
    assert ledger.read(jobs.counts) == {}
    said = architect.activate(ledger, settings, folder, "rows", "1.0.0", "back")
    assert said == "rows 1.0.0 gets new jobs; 1 job queued for known files"
    assert work_off(settings) == {"COMPLETED": 1}
    (job,) = ledger.read(lambda c: views.jobs(c, 9))
    assert job["plugin_version"] == "1.0.0"
