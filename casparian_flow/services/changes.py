"""What a person asks for: checked, written with its audit row, and told to the daemon."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs, routing, views
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import JobStatus
from casparian_flow.db.routing import compile_pattern
from casparian_flow.errors import CasparianError, ConfigError, DaemonGone, NotFound, SourceError
from casparian_flow.services import architect
from casparian_flow.services.walk import Ignore

log = logging.getLogger(__name__)

LIMIT_SECONDS = 86_400.0 * 366
"""Of a settle time and of a minimum age."""

CHUNK = 10_000
"""Jobs changed in one transaction."""


WORDS_LIMIT = 200
"""Characters of an owner's name or of a reason."""


def check_words(what: str, words: str) -> None:
    """Return if these words can be kept for ever and shown to anybody.

    Raises:
        CasparianError: they are empty, too many, or would move a terminal's cursor.
    """
    if not words.strip() or not words.isprintable() or len(words) > WORDS_LIMIT:
        raise CasparianError(
            f"{words[:80]!r} cannot be the {what}", f"use 1 to {WORDS_LIMIT} printable characters"
        )


def ring(settings: Settings, *, scan: bool = False) -> None:
    """Tell the daemon, if one runs, that the ledger has changed.

    Args:
        scan: ask it for a full scan as well.
    """
    if durable.daemon_lock_holder(settings.database.daemon_lock) is None:
        return
    from casparian_flow.engine import control
    from casparian_flow.protocol import Ring

    try:
        control.ask(settings.database, Ring(scan=scan))
    except DaemonGone as error:
        log.warning("%s; it will see the change at its next look", error.message)


_DONE = {"retry": "retried", "abort": "aborted", "dismiss": "dismissed"}


class SourceOptions(NamedTuple):
    """What can be said of a source root; None leaves it as it is."""

    ignore: Sequence[str] | None = None
    """gitignore patterns, in place of those there are."""
    settle_seconds: float | None = None
    done_file: str | None = None
    min_age_seconds: float | None = None

    def columns(self) -> dict[str, Any]:
        """The columns of `SourceRoot` that are to change.

        Raises:
            SourceError: one of them cannot be meant.
        """
        for pattern in self.ignore or ():
            _check_pattern(pattern)
        _check_seconds("settle time", self.settle_seconds, "2 is the default")
        _check_seconds("minimum age", self.min_age_seconds, "0 is the default")
        if self.done_file:
            _check_done_file(self.done_file)
        ignore = None if self.ignore is None else "\n".join(self.ignore)
        given = {**self._asdict(), "ignore": ignore}
        return {name: value for name, value in given.items() if value is not None}


def add_source(
    ledger: Ledger,
    settings: Settings,
    path: str,
    *,
    name: str | None = None,
    options: SourceOptions,
) -> str:
    """Watch a directory, or watch a removed one again; the source root's name.

    Raises:
        SourceError: it cannot be a source root; the message says why.
    """
    path = os.path.abspath(path)
    _check_folder(path)
    _check_name(name)
    columns = options.columns()
    if name is not None:
        columns["name"] = name

    def work(connection: Connection) -> str:
        known = routing.every_root(connection)
        _check_place(path, name, known)
        # A removed one comes back whatever the directory is called now: its files are known.
        here = os.path.realpath(path)
        earlier = next((r.id for r in known if here == os.path.realpath(r.path)), None)
        if earlier is None:
            columns.update({"path": path, "ignore": columns.get("ignore", "")})
        return routing.add_root(connection, earlier, **columns)

    added = ledger.write(work)
    crashpoint("changes.source_added")
    ring(settings, scan=True)
    return added


def set_source(ledger: Ledger, settings: Settings, name: str, options: SourceOptions) -> list[str]:
    """Change what is said of a source root, from its next scan on; what was changed.

    Raises:
        NotFound: no active source root has that name.
        SourceError: an option cannot be meant, or none was given.
    """
    columns = options.columns()
    if not columns:
        raise SourceError("nothing to change", "casparian source set --help")
    if not ledger.write(lambda c: routing.set_root(c, name, **columns)):
        raise NotFound(f"no active source root is named {name!r}", "casparian source list")
    ring(settings, scan=True)
    return sorted(columns)


def _check_folder(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SourceError(
            f"the path {path.encode('utf-8', 'backslashreplace').decode()} is not UTF-8",
            "rename that directory; the files in it may have any name",
        ) from None
    try:
        with os.scandir(path):
            pass
    except OSError as error:
        raise SourceError(
            f"{path} cannot be a source root: {error.strerror}",
            "name a directory that is there and that you may read",
        ) from error


def _check_name(name: str | None) -> None:
    if name is not None and (not name.isprintable() or not name.strip() or "/" in name):
        raise SourceError(f"{name!r} cannot be a source root's name", "use letters and digits")


def _check_pattern(pattern: str) -> None:
    try:
        pattern.encode()
        Ignore(pattern)
    except ValueError as error:
        raise SourceError(
            f"{pattern!r} is not an ignore pattern: {error}", "write it as in a .gitignore"
        ) from error


def _check_seconds(what: str, seconds: float | None, usual: str) -> None:
    if seconds is not None and not 0 <= seconds <= LIMIT_SECONDS:
        raise SourceError(
            f"a {what} of {seconds:g} s is out of range", f"0 to {LIMIT_SECONDS:g} seconds; {usual}"
        )


def _check_done_file(done_file: str) -> None:
    """A file must not be its own marker, nor a marker lie in another directory."""
    rest = done_file.replace("{name}", "").replace("{stem}", "")
    fits = rest.strip(".") and done_file.isprintable() and not set("/{}") & set(rest)
    if not fits or len(done_file) > WORDS_LIMIT:
        raise SourceError(
            f"{done_file[:80]!r} cannot name done files",
            "use '{name}.done', '{stem}.ok', or one name for a whole folder, such as '_SUCCESS'",
        )


def _check_place(path: str, name: str | None, known: Sequence[Any]) -> None:
    """No file may be in two roots: it would have two locations, and its rows come twice."""
    here = os.path.realpath(path)
    for root in known:
        there = os.path.realpath(root.path)
        if name == root.name and here != there:
            raise SourceError(
                f"the name {name} is taken by {root.path}", "choose another one with --name"
            )
        if not root.active:
            continue
        if here == there:
            raise SourceError(
                f"{path} is a source root already: {root.name}",
                f"casparian source set {root.name} --help   (to change its options)",
            )
        if os.path.commonpath([here, there]) in (here, there):
            inner, outer = ("is inside", "leave") if len(here) > len(there) else ("contains", "")
            raise SourceError(
                f"{path} {inner} the source root {root.name} ({root.path})",
                "its files are seen already"
                if outer
                else f"casparian source remove {root.name}   (then add this one: its files are new "
                "locations, and their rows come again)",
            )


def remove_source(ledger: Ledger, settings: Settings, name: str) -> None:
    """Scan a root no more. Nothing is deleted; adding its directory again brings it back.

    Raises:
        NotFound: no active source root has that name.
    """
    if not ledger.write(lambda c: routing.remove_root(c, name)):
        raise NotFound(f"no active source root is named {name!r}", "casparian source list")
    ring(settings, scan=True)


def add_rule(
    ledger: Ledger,
    settings: Settings,
    pattern: str,
    tag: str,
    priority: int,
    *,
    any_case: bool = True,
) -> tuple[int, int]:
    """Add a routing rule and queue what it asks for; the rule's id, and how many jobs.

    Raises:
        ConfigError: not a glob, not a tag, or there already.
    """
    try:
        compile_pattern(pattern)
        pattern.encode()
        tag.encode()
    except (ValueError, re.error) as error:
        raise ConfigError(f"{pattern!r} cannot be a rule's pattern: {error}", "*.csv") from error
    if "," in tag or tag != tag.strip() or not tag:
        raise ConfigError(f"{tag!r} is not a tag", "a tag is one word without commas")
    rule_id = ledger.write(lambda c: routing.add_rule(c, pattern, tag, priority, any_case))
    if rule_id is None:
        raise ConfigError(f"there is a rule {pattern} -> {tag} already", "casparian rules list")
    queued = architect.queue_missing(ledger)
    ring(settings)
    return rule_id, queued


def remove_rule(ledger: Ledger, settings: Settings, rule_id: int) -> str:
    """Remove a routing rule; jobs it has queued stay. The rule in words.

    Raises:
        NotFound: no rule has that id.
    """
    removed = ledger.write(lambda c: routing.remove_rule(c, rule_id))
    if removed is None:
        raise NotFound(f"there is no rule {rule_id}", "casparian rules list")
    ring(settings)
    return removed


def retry_jobs(
    ledger: Ledger,
    settings: Settings,
    job_ids: Sequence[int] | None,
    *,
    plugin: str | None = None,
    path: str | None = None,
) -> int:
    """Queue failed or aborted jobs again, with a fresh budget of attempts; how many.

    Superseded ones too, where the snapshot store has their version's bytes.

    Args:
        job_ids: None means every FAILED one whose failure is open (`db.jobs`).
        plugin: of those, only this plugin's.
        path: of those, only the ones of files whose path matches this glob.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some are neither, and have no snapshot; the others were queued.
    """
    if job_ids is None:
        job_ids = ledger.read(lambda c: jobs.failed_job_ids(c, jobs.OPEN_FAILURE, plugin, path))
    wanted = "FAILED or ABORTED, or SUPERSEDED with a snapshot of the version,"
    return _change(ledger, settings, "retry", jobs.retry, job_ids, wanted)


def dismiss_jobs(ledger: Ledger, settings: Settings, job_ids: Sequence[int] | None) -> int:
    """Accept failures, so that nobody counts them any more; how many.

    Args:
        job_ids: None means every one whose file is gone.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some are not FAILED; the others were dismissed.
    """
    if job_ids is None:
        job_ids = ledger.read(lambda c: jobs.failed_job_ids(c, jobs.GONE_UNREAD))
    return _change(ledger, settings, "dismiss", jobs.dismiss, job_ids, "FAILED")


def abort_jobs(ledger: Ledger, settings: Settings, job_ids: Sequence[int]) -> int:
    """End queued and running jobs; how many. The guest of a running one is killed.

    Raises:
        NotFound: no job has one of these ids.
        CasparianError: some have ended, or are decided; the others were aborted.
    """
    change = partial(jobs.abort, who=routing.actor())
    return _change(ledger, settings, "abort", change, job_ids, "QUEUED or RUNNING")


def _change(
    ledger: Ledger,
    settings: Settings,
    verb: str,
    change: Callable[[Connection, Sequence[int]], list[int]],
    job_ids: Sequence[int],
    wanted: str,
) -> int:
    def work(connection: Connection, chunk: Sequence[int]) -> list[int]:
        found = sorted(change(connection, chunk))
        routing.note(connection, verb, [f"job {job_id}" for job_id in found])
        return found

    changed: list[int] = []
    for start in range(0, len(job_ids), CHUNK):
        changed += ledger.write(partial(work, chunk=job_ids[start : start + CHUNK]))
    if changed:
        ring(settings)
    for job_id in sorted(set(job_ids).difference(changed)):
        found = ledger.read(partial(views.job, job_id=job_id))
        if found is None:
            raise NotFound(f"there is no job {job_id}", "casparian jobs")
        if verb == "abort" and found["status"] == JobStatus.COMMITTING:
            raise CasparianError(
                f"job {job_id} is decided already: its output will appear",
                f"casparian jobs show {job_id}",
            )
        raise CasparianError(
            f"job {job_id} is {found['status']}; only jobs that are {wanted} can be {_DONE[verb]}",
            f"casparian jobs show {job_id}",
        )
    return len(changed)
