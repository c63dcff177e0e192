"""What must hold in the ledger whatever happened: each check gives a sentence for each break."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, text

from casparian_flow.db.replay import told

_BREAKS = {
    "location {0} ({1}): its versions are not numbered 1, 2, 3, ...": """
        SELECT l.id, l.rel_path FROM cf_file_version v JOIN cf_file_location l
        ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE NOT EXISTS (SELECT 1 FROM cf_found_output f
                          WHERE f.source = r.name AND f.path = l.path)
        GROUP BY l.id HAVING min(v.ordinal) <> 1 OR max(v.ordinal) <> count(*)
        """,
    "location {0} ({1}): its current version is not its last one": """
        SELECT l.id, l.rel_path FROM cf_file_location l
        WHERE l.current_version_id IS NOT (
            SELECT v.id FROM cf_file_version v WHERE v.location_id = l.id
            ORDER BY v.ordinal DESC LIMIT 1)
        """,
    "job {0} is COMPLETED, and its output {1} is {2}": """
        SELECT j.id, o.topic, o.state FROM cf_processing_queue j
        JOIN cf_output o ON o.job_id = j.id
        WHERE j.status = 'COMPLETED' AND o.state <> 'PUBLISHED'
        """,
    "job {0} is {1}, and no attempt of it staged its output": """
        SELECT j.id, j.status FROM cf_processing_queue j
        WHERE j.status IN ('COMPLETED', 'COMMITTING') AND NOT EXISTS (
            SELECT 1 FROM cf_attempt a
            WHERE a.job_id = j.id AND a.fence = j.fence AND a.outcome = 'STAGED')
        """,
    "job {0} has an attempt {1}, which it never claimed": """
        SELECT j.id, a.fence FROM cf_processing_queue j JOIN cf_attempt a ON a.job_id = j.id
        WHERE a.fence > j.fence
        """,
    "job {0} is {1} without a reason": """
        SELECT id, status FROM cf_processing_queue
        WHERE status IN ('FAILED', 'SUPERSEDED') AND reason = ''
        """,
    "job {0} is FAILED, and neither an attempt nor the audit says so": """
        SELECT j.id FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
        AND NOT EXISTS (SELECT 1 FROM cf_attempt a WHERE a.job_id = j.id AND a.fence = j.fence)
        AND 'job ' || j.id NOT IN (SELECT subject FROM cf_audit WHERE action IN ('fail', 'refuse'))
        """,
    "job {0} is COMPLETED, and the audit has no commit of it": """
        SELECT substr(subject, 5) FROM (
            SELECT 'job ' || id AS subject FROM cf_processing_queue WHERE status = 'COMPLETED'
            EXCEPT SELECT subject FROM cf_audit WHERE action = 'commit')
        """,
    "row {1} of {0} points to a row of {2} that is not there": "PRAGMA foreign_key_check",
}


def breaks(connection: Connection) -> Iterator[str]:
    """Every invariant that does not hold."""
    for words, query in _BREAKS.items():
        yield from told("the ledger", _broken(connection, words, query))
    for (found,) in connection.execute(text("PRAGMA integrity_check")):
        if found != "ok":
            yield f"the database is damaged: {found}"


def _broken(connection: Connection, words: str, query: str) -> Iterator[str]:
    for row in connection.execute(text(query)):
        yield words.format(*row)


def damage(connection: Connection) -> str:
    """What is wrong with the database's pages, looked at in order and not in depth; else empty."""
    found: str = connection.execute(text("PRAGMA quick_check(1)")).scalar_one()
    return "" if found == "ok" else found


def running(connection: Connection) -> Iterator[str]:
    """Jobs that are RUNNING; to be asked when nobody can be running them."""
    query = text("SELECT id FROM cf_processing_queue WHERE status = 'RUNNING'")
    for job_id in connection.execute(query).scalars():
        yield f"job {job_id} is RUNNING, and no daemon runs (casparian start puts it right)"


def sizes(connection: Connection) -> dict[str, int]:
    """How much there is to check."""
    tables = {
        "locations": "SELECT count(*) FROM cf_file_location",
        "versions": "SELECT count(*) FROM cf_file_version",
        "jobs": "SELECT count(*) FROM cf_processing_queue",
        "attempts": "SELECT count(*) FROM cf_attempt",
        "audit rows": "SELECT count(*) FROM cf_audit",
        "snapshots": "SELECT count(*) FROM cf_snapshot",
    }
    return {name: connection.execute(text(query)).scalar_one() for name, query in tables.items()}
