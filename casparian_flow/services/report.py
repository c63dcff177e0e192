"""The state of everything, and advice on what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from casparian_flow import bundled, durable
from casparian_flow.config import ScanSettings, Settings
from casparian_flow.db import (
    failures,
    jobs,
    kept,
    outputs,
    rebuild,
    tables,
    taken,
    versions,
    views,
)
from casparian_flow.db import topics as db_topics
from casparian_flow.db.access import Ledger, Row
from casparian_flow.db.plugins import EARLIER_FORM, in_earlier_form, only_adopted
from casparian_flow.db.routing import compile_pattern
from casparian_flow.db.states import PAUSED, JobStatus
from casparian_flow.engine import sinks
from casparian_flow.errors import CasparianError, NotFound, counted
from casparian_flow.services import inventory, store_upkeep
from casparian_flow.services.walk import BUILT_IN_IGNORES

WRITTEN = 20
"""At most so many files that are still being written are listed."""

WAL_LIMIT_BYTES = 64 << 20
"""Only a reader that stays open makes the write-ahead log larger than this."""


SHOWN = 10
"""At most so many reasons, and versions with many rejects, are listed."""


class Advice(NamedTuple):
    """What is wrong or missing, and what to type next."""

    words: str
    command: str
    wrong: bool = True
    """Whether somebody must act: then `status --check` fails and `scan -q` prints it."""


def status(settings: Settings, ledger: Ledger) -> dict[str, Any]:
    """The document of `casparian status --json`."""
    amount = ledger.read(outputs.rejected_shown)
    reasons = ledger.read(lambda c: views.reasons(c, SHOWN))
    named = ledger.read(lambda c: outputs.reject_counts(c, SHOWN))
    topics = ledger.read(views.topics)
    daemon = durable.daemon_lock_holder(settings.database.daemon_lock)
    return {
        "database": str(settings.database.path),
        "daemon": daemon,
        "refused": _refused(settings) if daemon else {},
        "sources": sources(settings, ledger),
        "still_written": ledger.read(lambda c: versions.unsettled_files(c, WRITTEN)),
        "still_written_in_all": ledger.read(versions.count_unsettled),
        "unrouted": ledger.read(views.count_unrouted),
        "scrub": _scrub(settings),
        "store": store_upkeep.report(ledger),
        "sandbox": settings.guest.sandbox,
        "held_by": ledger.read(views.last_sandbox),
        "jobs": counts(ledger),
        "rebuilds": [
            {**each._asdict(), "stopped": len(each.stopped)}
            for each in ledger.read(rebuild.progress)
        ],
        "rows": amount.rows,
        "rejects": amount.rejects,
        "gone": ledger.read(outputs.of_gone)._asdict(),
        "stale": ledger.read(outputs.stale)._asdict(),
        "reasons": reasons,
        "reasons_in_all": reasons.total,
        "rejected_most": named,
        "rejected_most_in_all": named.total,
        "tables": ledger.read(taken.listed),
        "plugins": [row for row in ledger.read(views.plugins) if row["active"]],
        "sinks": _sinks(settings, topics),
        "advice": [advice._asdict() for advice in advise(settings, ledger)],
    }


def counts(ledger: Ledger) -> dict[str, int]:
    """Jobs by their status: FAILED are those whose failure is open; those that are held and those
    that are gone unread are apart (`db.failures`)."""
    found = ledger.read(jobs.counts)
    if JobStatus.FAILED in found:
        del found[JobStatus.FAILED]
        states = ledger.read(failures.counts)
        if opened := states.get(failures.OPEN):
            found[JobStatus.FAILED] = opened
        for apart in (failures.HELD, failures.GONE_UNREAD):
            if number := states.get(apart):
                found[apart] = number
    return found


def sources(settings: Settings, ledger: Ledger) -> list[Row]:
    """Every source root with its options, its last scan, and how it is watched."""
    rows = ledger.read(views.roots)
    daemon = durable.daemon_lock_holder(settings.database.daemon_lock)
    for row in rows:
        if not daemon or not row["active"]:
            row["watch"] = "no"
    return rows


def source(settings: Settings, ledger: Ledger, name: str) -> Row:
    """One source root as in `sources`, and its ignore patterns.

    Raises:
        NotFound: no source root has that name.
    """
    found = next((row for row in sources(settings, ledger) if row["name"] == name), None)
    if found is None:
        raise NotFound(f"no source root is named {name!r}", "casparian source list")
    return {
        **found,
        "ignore": found["ignore"].splitlines(),
        "ignored_by_default": list(BUILT_IN_IGNORES),
        "passed_over": ledger.read(lambda c: versions.count_passed_over(c, name)),
    }


def _scrub(settings: Settings) -> str:
    scan = settings.scan
    if not scan.scrub_days:
        return "OFF: a change that keeps a file's size and timestamps is never found"
    rate = scan.scrub_bytes_per_second / (1 << 20)
    return f"every {scan.scrub_days:g} days, {rate:.3g} MiB a second"


def _refused(settings: Settings) -> dict[str, int]:
    from casparian_flow.engine import control

    return control.refusals(settings.database)


def _sinks(settings: Settings, topics: list[Row]) -> list[Row]:
    """Every sink of a topic, with its absolute place or its error."""
    found: dict[str, Row] = {}
    for topic in topics:
        uri = topic["uri"]
        sink = found.setdefault(uri, {"uri": uri, "place": "", "topics": "", "rows": 0})
        try:
            sink["place"] = sinks.resolve(uri, settings.home)
        except CasparianError as error:
            sink["place"] = error.message
        sink["topics"] = ", ".join(filter(None, [sink["topics"], topic["topic"]]))
        sink["rows"] += topic["rows"]
    return list(found.values())


def advise(settings: Settings, ledger: Ledger, *, of_jobs: bool = True) -> list[Advice]:
    """What keeps files from becoming tables, most important first.

    Args:
        of_jobs: include advice on jobs that wait, are paused or have failed.
    """
    roots = [root for root in sources(settings, ledger) if root["active"]]
    plugins = ledger.read(views.plugins)
    tally = counts(ledger)
    daemon = durable.daemon_lock_holder(settings.database.daemon_lock)
    found = [*_dangers(settings)]
    if not roots:
        found.append(Advice("no source root: nothing is scanned", "casparian source add DIR"))
    if not plugins:
        found.append(
            Advice(
                "no plugin is published: files are recorded but not processed",
                "casparian table add NAME GLOB, or: casparian publish PLUGIN   "
                "(casparian plugins bundled lists some)",
            )
        )
    active = {plugin["name"] for plugin in plugins if plugin["active"]}
    lost = ledger.read(only_adopted)
    for name in lost:
        words = f"plugin {name} is not in this ledger, and sinks have outputs of it"
        found.append(Advice(words, f"casparian publish {bundled.argument(name)}"))
    idle = {plugin["name"] for plugin in plugins} - active - set(lost)
    if idle:  # a table that was removed is no fault: nothing is to be done
        idle -= {row["table"] for row in ledger.read(tables.listed)}
    for name in sorted(idle):
        words = f"no version of plugin {name} is active"
        found.append(Advice(words, f"casparian plugins verify {name}"))
    for name, version in ledger.read(in_earlier_form):
        words = f"plugin {name} {version} may not run: {EARLIER_FORM}"
        found.append(Advice(words, f"casparian publish {bundled.argument(name)}"))
    found += _advise_sinks(settings, ledger)
    for root in roots:
        found += _advise_on(root, settings.scan, daemon is not None)
    for rule in ledger.read(views.rules):
        if fault := rule_fault(rule["pattern"]):
            words = f"rule {rule['id']} matches nothing: {fault}"
            found.append(Advice(words, f"casparian rules remove {rule['id']}"))
    if plugins:
        found += unrouted(ledger)
    found += _advise_rebuilds(ledger)
    found += _copies(ledger)
    found += _left_to_tables(ledger)
    if of_jobs:
        found += _advise_jobs(ledger, tally, daemon is not None)
    found += _advise_store(settings, ledger, tally.get("SUPERSEDED", 0))
    return found


def _advise_sinks(settings: Settings, ledger: Ledger) -> Iterator[Advice]:
    """Advice on sinks that may have more than the ledger knows."""
    if inventory.may_be_older(settings.database, ledger):
        words = "this ledger may be older than its sinks: rows may be shown that are not current"
        yield Advice(words, "casparian scan   (asks the sinks; or: casparian start)")
    for location, why in inventory.waiting(settings, ledger).items():
        if why:
            words = f"sink {location} cannot be asked what it has: {why}; its jobs wait"
            yield Advice(words, "fix that; a daemon asks it every few seconds")


def unrouted(ledger: Ledger) -> list[Advice]:
    """Advice on files that match no plugin, if any."""
    count = ledger.read(views.count_unrouted)
    words = f"{counted(count, 'file')} {'matches' if count == 1 else 'match'} no plugin"
    return [Advice(words, "casparian files --unrouted", wrong=False)] if count else []


def _copies(ledger: Ledger) -> Iterator[Advice]:
    """Advice on files with the content of a deleted one, if any."""
    count = ledger.read(lambda c: views.copies(c, 1)).total
    if count:
        has = "has" if count == 1 else "have"
        words = (
            f"{counted(count, 'file')} {has} the content of a deleted file: rows may be there twice"
        )
        command = "casparian files --copies   (casparian retract hides a deleted file's rows)"
        yield Advice(words, command, wrong=False)


def _left_to_tables(ledger: Ledger) -> Iterator[Advice]:
    """Advice on rows that a catch-all plugin gave of files before a table got them, if any."""
    for table in ledger.read(taken.listed):
        for left in table["left"]:
            stay = "stays" if left["rows"] == 1 else "stay"
            words = (
                f"table {table['name']} has {counted(left['files'], 'file')} that plugin "
                f"{left['plugin']} read before: {counted(left['rows'], 'row')} of {left['plugin']} "
                f"{stay}"
            )
            yield Advice(words, "casparian files   (names the table of each file)", wrong=False)


def _advise_jobs(ledger: Ledger, tally: dict[str, int], worked: bool) -> Iterator[Advice]:
    """Advice on jobs that wait, are paused or have failed."""
    queued, failed, gone = (tally.get(s, 0) for s in ("QUEUED", "FAILED", failures.GONE_UNREAD))
    if queued and not worked:
        words = f"{counted(queued, 'job')} {_be(queued)} queued and no daemon is running"
        yield Advice(words, "casparian start   (or: casparian scan --drain)")
    waits = ledger.read(lambda c: views.waiting(c, PAUSED))
    if waits.paused:
        words = f"{counted(waits.paused, 'job')} {_be(waits.paused)} {waits.reason}"
        yield Advice(words, "fix that; the jobs are retried every few seconds")
    if failed:
        command = "casparian jobs --status FAILED   (then: casparian jobs retry, or dismiss)"
        yield Advice(f"{counted(failed, 'job')} failed", command)
    yield from held(ledger)
    if gone:
        some = counted(gone, "version")
        words = f"{some} {_be(gone)} gone unread: the job failed, then the file was deleted"
        command = "casparian jobs --status gone-unread   (then: casparian jobs dismiss --all-gone)"
        yield Advice(words, command, wrong=False)


def held(ledger: Ledger, job_ids: Sequence[int] | None = None) -> list[Advice]:
    """Advice on versions that wait for a person to decide, by plugin.

    Args:
        job_ids: only of these jobs.
    """
    found = []
    for row in ledger.read(lambda c: failures.held(c, job_ids)):
        some = counted(row["versions"], "version")
        what = f"table {row['plugin']}" if row["is_table"] else f"plugin {row['plugin']}"
        words = (
            f"{what}: {some} {_be(row['versions'])} held, such as {row['source']}/"
            f"{row['rel_path']}, version {row['version']}: {row['reason'].removeprefix('held: ')}"
        )
        listed = "casparian jobs --held lists them"
        command = f"casparian table accept {row['plugin']}   ({listed})"
        found.append(Advice(words, command if row["is_table"] else "casparian jobs --held"))
    return found


def _advise_rebuilds(ledger: Ledger) -> Iterator[Advice]:
    """Advice on rebuilds that are not complete, and on topics that get no new rows."""
    for each in ledger.read(rebuild.progress):
        yield Advice(each.words, each.command, wrong=each.is_stuck)
    for left in ledger.read(db_topics.undeclared):
        words = (
            f"{left.plugin} no longer declares the topic {left.topic}; {counted(left.rows, 'row')} "
            f"{'stays' if left.rows == 1 else 'stay'}"
        )
        yield Advice(words, f"casparian topics remove {left.plugin} {left.topic}", wrong=False)


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def _advise_on(root: Row, scan: ScanSettings, watched: bool) -> list[Advice]:
    """Advice on a source root."""
    name = root["name"]
    found = []
    if root["held"]:
        words = (
            f"source root {name}: {counted(root['held'], 'file')} disappeared at once, first "
            f"noticed at {root['held_since_at'][:19]}Z; not marked deleted for a day"
        )
        command = f"mount or restore them, or: casparian scan {name} --believe-deletions"
        found.append(Advice(words, command))
    if root["watch"].startswith("degraded"):
        pause = min(scan.poll_seconds, scan.rescan_seconds)
        words = (
            f"file events for source root {name} are unreliable ({root['watch']}); reconnecting, "
            f"and scanning every {pause:g} s meanwhile"
        )
        found.append(Advice(words, f"casparian scan {name}   (finds the changes now)"))
    if root["unreadable"]:
        words = f"source root {name}: {counted(root['unreadable'], 'file')} cannot be read"
        found.append(Advice(words, f"casparian files --source {name} --unreadable"))
    if root["problem"]:
        found.append(Advice(root["problem"], "mount or restore it, then: casparian scan"))
    elif not root["scanned_at"] and not watched:
        command = f"casparian scan {name}"
        found.append(Advice(f"source root {name} was never scanned", command))
    return found


def _dangers(settings: Settings) -> Iterator[Advice]:
    """Advice on the place of the database."""
    path = settings.database.path
    if words := durable.unfit_for_database(path):
        yield Advice(words, "move it to a local disk: [database] db_location")
    wal = path.with_name(f"{path.name}-wal")
    size = wal.stat().st_size if wal.exists() else 0
    if size > WAL_LIMIT_BYTES:
        words = (
            f"the database's write-ahead log has grown to {size >> 20} MiB: another program "
            "keeps the database open for reading, so it cannot shrink; jobs go on"
        )
        yield Advice(
            words, f"fuser {path}   (lists the programs; close the one that is not casparian)"
        )


def _advise_store(settings: Settings, ledger: Ledger, superseded: int) -> Iterator[Advice]:
    state = ledger.read(kept.state)
    if state.fault and settings.store.keep:
        words = f"{counted(state.missed, 'version')} recorded without their bytes: {state.fault}"
        command = "free some disk space; keeping resumes by itself   (docs/store.md)"
        yield Advice(words, command)
    if superseded and not settings.store.keep:
        words = (
            f"{counted(superseded, 'job')} superseded: the file changed or was deleted "
            "before the job ran"
        )
        command = "keep = true in [store] keeps the content of such files   (docs/store.md)"
        yield Advice(words, command, wrong=False)


def rule_fault(pattern: str) -> str:
    """Why a rule's pattern is invalid, as when written into the table directly; else empty."""
    try:
        compile_pattern(pattern)
    except (ValueError, re.error) as error:
        return str(error)
    return ""
