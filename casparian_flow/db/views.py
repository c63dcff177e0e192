"""Read-only queries for people and programs; rows are dictionaries.

A column named `..._at` is a time: ISO 8601, UTC. A column that is true or false must be in
`access._BOOLEANS`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, NamedTuple

from casparian_flow.db import failures, visibility
from casparian_flow.db import outputs as published
from casparian_flow.db.access import Connection, Page, Row, page
from casparian_flow.db.access import rows as _rows
from casparian_flow.db.routing import Routing, compile_pattern
from casparian_flow.db.states import PASSED_OVER
from casparian_flow.db.versions import route_text

EVERY = (1 << 63) - 1
"""An id that no row exceeds."""


def roots(connection: Connection) -> list[Row]:
    """Every source root, with what its last full scan found."""
    return _rows(
        connection,
        """
        SELECT r.name, r.path, r.active, coalesce(s.files, 0) AS files,
               coalesce(s.unreadable, 0) AS unreadable, coalesce(s.unsettled, 0) AS unsettled,
               CASE WHEN s.finished > 0
                    THEN strftime('%Y-%m-%d %H:%M:%f', s.finished, 'unixepoch') END AS scanned_at,
               coalesce(s.problem, '') AS problem, r.settle_seconds, r."ignore", r.done_file,
               r.min_age_seconds, r.on_delete, coalesce(s.watch, '') AS watch,
               coalesce(s.waiting, 0) AS waiting, coalesce(s.held, 0) AS held,
               CASE WHEN s.held_since > 0
                    THEN strftime('%Y-%m-%d %H:%M:%f', s.held_since, 'unixepoch') END
                    AS held_since_at,
               coalesce(s.missed, 0) AS missed, coalesce(s.hidden, 0) AS hidden,
               CASE WHEN s.scrubbed > 0
                    THEN strftime('%Y-%m-%d %H:%M:%f', s.scrubbed, 'unixepoch') END AS scrubbed_at
        FROM cf_source_root r LEFT JOIN cf_scan_state s ON s.source_root_id = r.id
        ORDER BY r.name
        """,
    )


def rules(connection: Connection) -> list[Row]:
    """Every routing rule, with the plugins that subscribe to its tag."""
    return _rows(
        connection,
        """
        SELECT r.id, r.pattern, CASE WHEN r.any_case THEN 'any' ELSE 'exact' END AS "case",
               r.tag, r.priority,
               (SELECT group_concat(p.plugin_name, ', ') FROM cf_plugin_config p
                WHERE instr(',' || replace(p.subscription_tags, ' ', '') || ',',
                            ',' || replace(r.tag, ' ', '') || ',')) AS plugins
        FROM cf_routing_rule r ORDER BY r.id
        """,
    )


def plugins(connection: Connection) -> list[Row]:
    """Every deployed plugin version."""
    return _rows(
        connection,
        """
        SELECT p.name, p.version, coalesce(c.active_version = p.version, 0) AS active,
               p.artifact_hash AS artifact,
               CASE p.manifest WHEN '' THEN '(adopted)' ELSE p.publisher END AS key_id,
               p.deployed_at,
               (SELECT group_concat(DISTINCT topic_name) FROM cf_topic_config
                WHERE plugin_name = p.name) AS topics,
               coalesce(c.subscription_tags, '') AS subscriptions,
               CASE WHEN NOT json_valid(p.manifest) THEN ''
                    WHEN json_type(p.manifest, '$.contract.table') IS NOT NULL THEN 'table'
                    WHEN json_extract(p.manifest, '$.catch_all') THEN 'catch-all'
                    ELSE '' END AS kind
        FROM cf_plugin p LEFT JOIN cf_plugin_config c ON c.plugin_name = p.name
        ORDER BY p.name, p.id
        """,
    )


def audit(
    connection: Connection, limit: int | None, subject: str | None, every: bool = False
) -> Page:
    """Rows of the audit, the newest first.

    Args:
        subject: a glob over their subjects.
        every: include the seals.
    """
    return page(
        connection,
        """
        SELECT seq, at AS recorded_at, actor, action, subject, detail FROM cf_audit
        WHERE (:subject IS NULL OR subject GLOB :subject) AND (:every OR action <> 'seal')
        ORDER BY seq DESC
        """,
        limit, subject=subject, every=every,
    )  # fmt: skip


def topics(connection: Connection) -> list[Row]:
    """Where every topic goes, and what is visible there; a URI may have `?mode=` in it."""
    return _rows(
        connection,
        f"""
        WITH shown AS (
            SELECT j.plugin_name, o.topic, o.uri, count(*) AS outputs, sum(o.rows) AS total
            FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
            JOIN cf_visibility s ON s.output_id = o.id
            WHERE {visibility.SHOWN} GROUP BY 1, 2, 3
        )
        SELECT t.plugin_name AS plugin, t.topic_name AS topic, t.uri, t.mode,
               coalesce(p.outputs, 0) AS outputs, coalesce(p.total, 0) AS "rows",
               EXISTS (SELECT 1 FROM cf_empty_topic e WHERE e.plugin_name = t.plugin_name
                       AND e.topic_name = t.topic_name) AS may_be_empty
        FROM (SELECT id, plugin_name, topic_name,
                     substr(uri, 1, instr(uri || '?', '?') - 1) AS uri,
                     CASE WHEN instr(uri, '?mode=') THEN substr(uri, instr(uri, '?mode=') + 6)
                          ELSE mode END AS mode
              FROM cf_topic_config) t
        LEFT JOIN shown p ON p.plugin_name = t.plugin_name AND p.topic = t.topic_name
                             AND p.uri = t.uri
        ORDER BY t.plugin_name, t.topic_name, t.id
        """,  # noqa: S608
    )


_JOB_TABLES = """
    FROM cf_processing_queue j
    JOIN cf_plugin p ON p.id = j.plugin_id
    JOIN cf_file_version v ON v.id = j.file_version_id
    JOIN cf_file_location l ON l.id = v.location_id
    JOIN cf_source_root r ON r.id = l.source_root_id
"""

_JOBS = f"""
    SELECT j.id, j.status, {failures.STATE} AS failure, j.plugin_name AS plugin,
           p.version AS plugin_version, r.name AS source, l.rel_path, v.ordinal AS version,
           j.attempts, {published.ROWS_COUNTED} AS "rows",
           {published.REJECTS_COUNTED} AS rejects, j.reason,
           j.created_at, j.finished_at
    {_JOB_TABLES}
"""


def jobs(
    connection: Connection,
    limit: int | None,
    status: str | None = None,
    plugin: str | None = None,
    path: str | None = None,
    failure: str | None = None,
    job_ids: Sequence[int] | None = None,
) -> Page:
    """Jobs, the newest first.

    Args:
        path: a glob over the path relative to the source root; `*` crosses directories.
        failure: only FAILED jobs in this failure state (`db.failures`).
        job_ids: only these.
    """
    which = f"""
        WHERE (:status IS NULL OR j.status = :status)
          AND (:plugin IS NULL OR j.plugin_name = :plugin)
          AND (:path IS NULL OR l.rel_path GLOB :path)
          AND (:failure IS NULL OR {failures.STATE} = :failure)
          AND (:ids IS NULL OR j.id IN (SELECT value FROM json_each(:ids)))
        """  # noqa: S608
    return page(
        connection, f"{_JOBS} {which} ORDER BY j.id DESC", limit,
        counted=f"SELECT j.id {_JOB_TABLES} {which}",
        status=status, plugin=plugin, path=path, failure=failure,
        ids=None if job_ids is None else json.dumps(list(job_ids)),
    )  # fmt: skip


def job(connection: Connection, job_id: int) -> Row | None:
    """A job in full: its version, every attempt with its log, every output. None: no such job."""
    rows = _rows(connection, _JOBS + "WHERE j.id = :id", id=job_id)
    if not rows:
        return None
    facts = _rows(
        connection,
        """
        SELECT r.path AS root, v.id AS version_id, v.content_hash, v.size_bytes, v.detected_at,
               p.artifact_hash AS artifact, j.priority, j.fence, j.worker,
               CASE WHEN j.not_before > 0
                    THEN strftime('%Y-%m-%d %H:%M:%f', j.not_before, 'unixepoch')
               END AS not_before_at
        FROM cf_processing_queue j
        JOIN cf_plugin p ON p.id = j.plugin_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE j.id = :id
        """,
        id=job_id,
    )
    attempts = _rows(
        connection,
        """
        SELECT fence, outcome, seconds, worker, ended_at, error, fault, "signal", exit_code,
               batches, "rows", max_rss_bytes, cpu_seconds, log, sandbox
        FROM cf_attempt WHERE job_id = :id ORDER BY fence
        """,
        id=job_id,
    )
    outputs = _rows(
        connection,
        f"""
        SELECT o.topic, o.uri, {published.STATE} AS state, o.target, o."rows", o.size_bytes,
               o.digest, o.output_key, o.location AS sink, o.published_at
        FROM cf_output o LEFT JOIN cf_visibility s ON s.output_id = o.id
        WHERE o.job_id = :id ORDER BY o.id
        """,  # noqa: S608
        id=job_id,
    )
    return {**rows[0], **facts[0], "attempt_log": attempts, "outputs": outputs}


def last_sandbox(connection: Connection) -> str:
    """The sandbox of the newest attempt's guest; empty before the first."""
    query = "SELECT sandbox FROM cf_attempt WHERE sandbox <> '' ORDER BY id DESC LIMIT 1"
    return connection.execute(query).scalar() or ""


def job_ids(
    connection: Connection,
    statuses: Sequence[str],
    plugin: str | None = None,
    path: str | None = None,
) -> list[int]:
    """Ids of every job in one of these statuses.

    Args:
        path: a glob over the path relative to the source root; `*` crosses directories.
    """
    query = """
        SELECT id FROM cf_processing_queue j
        WHERE status = :status AND (:plugin IS NULL OR plugin_name = :plugin)
          AND (:path IS NULL OR EXISTS (
              SELECT 1 FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
              WHERE v.id = j.file_version_id AND l.rel_path GLOB :path))
        ORDER BY id
        """
    chosen = {"plugin": plugin, "path": path}
    return [
        job_id
        for status in statuses
        for job_id in connection.execute(query, {"status": status, **chosen}).scalars()
    ]


def reasons(connection: Connection, limit: int | None) -> Page:
    """Why jobs wait, are held or have failed (open failures only); the commonest reason first."""
    return page(
        connection,
        f"""
        WITH judged AS (
            SELECT id, status, reason, {failures.STATE} AS failure FROM cf_processing_queue j
            WHERE status IN ('FAILED', 'QUEUED', 'COMMITTING') AND reason <> ''
        )
        SELECT CASE failure WHEN '{failures.HELD}' THEN 'HELD' ELSE status END AS status, reason,
               count(*) AS jobs, max(id) AS example FROM judged
        WHERE failure IN ('', '{failures.OPEN}', '{failures.HELD}')
        GROUP BY 1, reason ORDER BY 1, jobs DESC, reason
        """,  # noqa: S608
        limit,
    )


def files(
    connection: Connection,
    limit: int | None,
    source: str | None = None,
    gone: bool = False,
    unreadable: bool = False,
) -> Page:
    """Locations, with their current version and its jobs.

    Args:
        gone: deleted locations instead of present ones.
        unreadable: only those that the last scan could not read.
    """
    found = page(
        connection,
        f"""
        SELECT r.name AS source, l.rel_path, v.size_bytes, v.ordinal AS versions, v.content_hash,
               v.detected_at, l.gone_at, l.problem, {published.ROWS_OF_FILE} AS "rows",
               '' AS "table", l.path, r.id AS root_id,
               coalesce((SELECT q.name || '/' || m.rel_path FROM cf_gone_version g
                         JOIN cf_file_version t ON t.id = g.to_version_id
                         JOIN cf_file_location m ON m.id = t.location_id
                         JOIN cf_source_root q ON q.id = m.source_root_id
                         WHERE g.file_version_id = v.id AND l.gone_at IS NOT NULL), '') AS moved_to,
               (SELECT group_concat(j.plugin_name || ' ' || j.status, ', ')
                FROM cf_processing_queue j WHERE j.file_version_id = v.id) AS jobs
        FROM cf_file_location l
        JOIN cf_source_root r ON r.id = l.source_root_id
        LEFT JOIN cf_file_version v ON v.id = l.current_version_id
        WHERE (:source IS NULL OR r.name = :source)
          AND (l.gone_at IS NOT NULL) = :gone AND (NOT :unreadable OR l.problem <> '')
        ORDER BY r.name, l.path
        """,  # noqa: S608
        limit, source=source, gone=gone, unreadable=unreadable,
    )  # fmt: skip
    routing = Routing(connection)
    has_tables = any(taker.is_table for taker in routing.takers)
    for row in found:
        path, root_id = row.pop("path"), row.pop("root_id")
        if has_tables:
            routed = routing.route(route_text(path), root_id)
            instead = f" (not {', '.join(routed.yielding)})" if routed.yielding else ""
            row["table"] = ", ".join(routed.tables) + instead
    return found


def versions(connection: Connection, root_id: int, path: bytes, rel_path: str) -> list[Row]:
    """Every version of a location, in order; empty where the location is not recorded.

    Args:
        path: its relative path, as bytes.
        rel_path: the path as it is displayed, for names that are not UTF-8.
    """
    return _rows(
        connection,
        """
        SELECT r.name AS source, l.rel_path, v.ordinal AS version, v.id AS version_id,
               v.content_hash, v.size_bytes, v.detected_at,
               v.id = l.current_version_id AS current, l.gone_at,
               CASE WHEN k.id IS NOT NULL THEN 'kept' WHEN e.evicted_at IS NOT NULL THEN 'evicted'
                    ELSE 'not kept' END AS bytes,
               (SELECT group_concat('#' || j.id || ' ' || j.plugin_name || ' ' || j.status, ', ')
                FROM cf_processing_queue j WHERE j.file_version_id = v.id) AS jobs
        FROM cf_file_location l
        JOIN cf_source_root r ON r.id = l.source_root_id
        JOIN cf_file_version v ON v.location_id = l.id
        LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
        LEFT JOIN cf_evicted_content e ON e.content_hash = v.content_hash
        WHERE l.source_root_id = :root_id AND (l.path = :path OR l.rel_path = :rel_path)
        ORDER BY l.id, v.ordinal
        """,
        root_id=root_id, path=path, rel_path=rel_path,
    )  # fmt: skip


def committed(connection: Connection) -> list[Row]:
    """What `casparian query` reads; see `visibility.committed`."""
    return visibility.committed(connection)


def paths(connection: Connection) -> dict[str, str]:
    """Output key -> the file of each output, as `SOURCE/path`."""
    rows = connection.exec_driver_sql(
        """
        SELECT o.output_key, r.name || '/' || l.rel_path
        FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        """
    )
    return {row[0]: row[1] for row in rows}


class Waiting(NamedTuple):
    """Counts of unfinished jobs."""

    queued: int
    running: int
    committing: int
    paused: int
    """Queued or committing jobs that wait for a sink or the machine."""
    later: int
    """Queued jobs that wait for the time of their next attempt."""
    reason: str
    """Why a paused job waits."""

    @property
    def unfinished(self) -> int:
        return self.queued + self.running + self.committing


def waiting(connection: Connection, paused: str, up_to: int = EVERY) -> Waiting:
    """Count the unfinished jobs up to an id; why they wait is read only when none is running.

    Args:
        paused: prefix of the reason of a paused job.
    """
    by_status = """
        SELECT status, count(*) FROM cf_processing_queue
        WHERE status IN ('QUEUED', 'RUNNING', 'COMMITTING') AND id <= :up_to GROUP BY status
        """
    rows = connection.execute(by_status, {"up_to": up_to})
    counts: dict[str, int] = {row[0]: row[1] for row in rows}
    queued, running, committing = (
        counts.get(status, 0) for status in ("QUEUED", "RUNNING", "COMMITTING")
    )
    if running or not counts:
        return Waiting(queued, running, committing, 0, 0, "")
    why = _rows(
        connection,
        """
        SELECT count(CASE WHEN reason LIKE :paused || '%' THEN 1 END) AS paused,
               count(CASE WHEN reason NOT LIKE :paused || '%' AND not_before > :now
                          THEN 1 END) AS later,
               coalesce(max(CASE WHEN reason LIKE :paused || '%' THEN reason END), '') AS reason
        FROM cf_processing_queue
        WHERE status IN ('QUEUED', 'COMMITTING') AND id <= :up_to
        """,
        up_to=up_to, paused=paused, now=time.time(),
    )[0]  # fmt: skip
    return Waiting(queued, running, committing, why["paused"], why["later"], why["reason"])


def scans(connection: Connection) -> Sequence[Any]:
    """Active roots: name, path, settle_seconds, started, finished, unsettled, problem."""
    return connection.execute(
        """
            SELECT r.name, r.path, r.settle_seconds, coalesce(s.started, 0) AS started,
                   coalesce(s.finished, 0) AS finished, coalesce(s.unsettled, 0) AS unsettled,
                   coalesce(s.problem, '') AS problem
            FROM cf_source_root r LEFT JOIN cf_scan_state s ON s.source_root_id = r.id
            WHERE r.active ORDER BY r.id
            """
    ).all()


# Copies: present files with the content of a deleted one whose rows readers still see, and that are
# no move of it (`db.moves`). Its rows may be there twice.

_COPIES = f"""
    WITH deleted AS MATERIALIZED (
        SELECT g.id, r.name || '/' || g.rel_path AS shown, v.content_hash
        FROM cf_file_location g JOIN cf_source_root r ON r.id = g.source_root_id
        JOIN cf_file_version v ON v.id = g.current_version_id
        WHERE g.gone_at IS NOT NULL AND g.problem <> :passed_over AND v.size_bytes > 0
          AND v.id NOT IN (
            SELECT file_version_id FROM cf_gone_version WHERE to_version_id IS NOT NULL)
          AND EXISTS (
            SELECT 1 FROM cf_processing_queue j JOIN cf_output o ON o.job_id = j.id
            JOIN cf_visibility s ON s.output_id = o.id
            WHERE j.file_version_id = v.id AND o.rows > 0 AND {visibility.SHOWN}))
    SELECT r.name AS source, l.rel_path, v.size_bytes, v.detected_at,
           group_concat(deleted.shown, ', ') AS copy_of
    FROM cf_file_location l JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
    CROSS JOIN cf_file_version v ON v.id = l.current_version_id
    CROSS JOIN deleted ON deleted.content_hash = v.content_hash
    WHERE l.gone_at IS NULL AND (:source IS NULL OR r.name = :source)
      AND EXISTS (SELECT 1 FROM deleted)
    GROUP BY l.id ORDER BY r.name, l.path
"""  # noqa: S608


def copies(connection: Connection, limit: int | None, source: str | None = None) -> Page:
    """Present files with the content of a deleted file whose rows readers still see, and which."""
    return page(connection, _COPIES, limit, source=source, passed_over=PASSED_OVER)


# Unrouted files: their current version has no job, so no rule brings it to a plugin. A version gets
# its jobs when it is recorded, or when the rules change.

_UNROUTED = """
    FROM cf_file_location l
    JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
    JOIN cf_file_version v ON v.id = l.current_version_id
    WHERE l.gone_at IS NULL AND (:source IS NULL OR r.name = :source)
      AND NOT EXISTS (SELECT 1 FROM cf_processing_queue j
                      WHERE j.file_version_id = l.current_version_id)
"""

CHOICES = 50
"""Alternatives of a pattern with braces, at most."""

NEAR = 0.6
"""Similarity of an ending and a rule (0 to 1) from which the rule is named."""


def count_unrouted(connection: Connection, source: str | None = None) -> int:
    """How many unrouted files active source roots have."""
    query = f"SELECT count(*) {_UNROUTED}"
    return int(connection.execute(query, {"source": source}).scalar_one())


def unrouted_files(connection: Connection, limit: int | None, source: str | None = None) -> Page:
    """Unrouted files, each with the rule that is nearest to matching it; empty where none is."""
    unrouted = page(
        connection,
        f"""
        SELECT r.name AS source, l.rel_path, v.size_bytes, v.ordinal AS versions,
               v.content_hash, v.detected_at
        {_UNROUTED} ORDER BY r.name, l.path
        """,
        limit,
        counted=f"SELECT 1 {_UNROUTED}",
        source=source,
    )
    rules = Rules(connection)
    for row in unrouted:
        row["nearest"] = rules.nearest(row["rel_path"])
    return unrouted


class _RuleMatcher(NamedTuple):
    shown: str
    pattern: re.Pattern[str]
    literals: tuple[str, ...]
    fault: str
    """Why a file that it matches gets no job; else empty."""


class Rules:
    """The routing rules, to find the one that comes nearest to matching a file."""

    def __init__(self, connection: Connection) -> None:
        self._rules: list[_RuleMatcher] = []
        for row in rules(connection):
            try:
                pattern = compile_pattern(row["pattern"])
            except (ValueError, re.error):
                continue
            fault = "" if row["plugins"] else f"no plugin subscribes to tag {row['tag']}"
            if row["plugins"] and row["case"] == "exact":
                fault = "this rule matches only its exact case"
            shown = f"{row['plugins'] or row['tag']} {row['pattern']}"
            matcher = _RuleMatcher(shown, pattern, literals(row["pattern"].lower()), fault)
            self._rules.append(matcher)
        self._by_ending = lru_cache(4096)(self._alike)

    def nearest(self, path: str) -> str:
        """The nearest rule: its plugin and pattern, and why it gives no job where it matches."""
        for rule in self._rules:
            if rule.fault and rule.pattern.match(path):
                return f"{rule.shown} ({rule.fault})"
        name = path.rpartition("/")[2]
        for rule in self._rules:
            if rule.pattern.match(name) or any(rule.pattern.match(part) for part in _shorter(name)):
                return rule.shown
        return self._by_ending(re.sub(r"\d+", "0", name.lower())[-80:])

    def _alike(self, name: str) -> str:
        """The rule whose literal part is most similar to a name or to its ending."""
        ending = name[name.rfind(".") :] if "." in name else name
        best, shown = NEAR, ""
        for rule in self._rules:
            for literal in rule.literals:
                for part in {ending, name}:
                    alike = SequenceMatcher(None, part, literal, autojunk=False)
                    if alike.real_quick_ratio() > best and (ratio := alike.ratio()) > best:
                        best, shown = ratio, rule.shown
        return shown


def _shorter(name: str) -> list[str]:
    """The name without its last extensions: `a.csv.bak` and `a.csv.1` without theirs."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 1, -1)]


def literals(pattern: str) -> tuple[str, ...]:
    """The literal parts of a pattern: `*.{csv,tsv}` has `.csv` and `.tsv`."""
    pending, parts = [pattern], list[str]()
    while pending and len(parts) < CHOICES:
        text = pending.pop()
        if choice := re.search(r"\{([^{}]*)\}", text):
            options = choice[1].split(",")[: CHOICES - len(parts)]
            pending += [
                f"{text[: choice.start()]}{option}{text[choice.end() :]}"
                for option in reversed(options)
            ]
        elif group := re.search(r"([@+?*!])\(([^()]*)\)", text):
            first = group[2].split("|")[0] if group[1] in "@+" else ""
            pending.append(f"{text[: group.start()]}{first}{text[group.end() :]}")
        else:
            parts.append(re.sub(r"\[[^\]]*\]|[*?]", "", text.rpartition("/")[2]))
    return tuple(dict.fromkeys(filter(None, parts)))
