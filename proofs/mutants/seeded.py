"""Bugs that a careful person could write, and the tests that must catch each.

Each is a small edit of the package. If what it edits has changed, the mutant is an error until
somebody writes it anew: a list that silently shrinks proves nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Edit(NamedTuple):
    """One replacement in one file of the package."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A seeded bug."""

    name: str
    edits: list[Edit]
    tests: list[str]
    """What must fail with it, and pass without: test ids."""


_TRACED = "tests/proofs/test_syscalls.py::test_nothing_is_lost"
_SINKS = "tests/sinks"
_SERVER = "tests/sinks/test_mssql_crashes.py::test_the_first_output"
_DURABLE = f"{_TRACED}[what must be durable before what]"

_COMMITTED = """\
            for words in ("RELEASE job", "COMMIT", "BEGIN IMMEDIATE", "SAVEPOINT job"):
                connection.execute(words)
"""
"""Ends the SQLite sink's transaction where it must not end, and begins another one."""

MUTANTS = [
    Mutant(
        "no file fsync",
        [Edit("engine/sinks/parts.py", "        durable.fsync_path(file)\n", "")],
        [_DURABLE],
    ),
    Mutant(
        "no directory fsync",
        [Edit("engine/sinks/parquet.py", "durable.fsync_path(folder)", "pass")],
        [_DURABLE],
    ),
    Mutant(
        "no fence check",
        [
            Edit(
                "db/jobs.py",
                "AND (id, fence) IN\n            (SELECT json_extract(value, '$[0]'), "
                "json_extract(value, '$[1]')\n             FROM json_each(:attempts))\n"
                "        RETURNING id, fence",
                "AND id IN\n            (SELECT json_extract(value, '$[0]') "
                "FROM json_each(:attempts))\n        RETURNING id, fence",
            )
        ],
        ["tests/db/test_jobs.py::test_a_slow_loser_cannot_touch_the_winners_attempt"],
    ),
    Mutant(
        "synchronous NORMAL",
        [Edit("db/schema.py", '"PRAGMA synchronous = FULL"', '"PRAGMA synchronous = NORMAL"')],
        [_DURABLE],
    ),
    Mutant(
        "rename over",
        [
            Edit(
                "engine/sinks/parquet.py",
                "looked.append(self._settled(output) or ",
                "looked.append(",
            ),
            Edit("engine/sinks/parquet.py", "os.link(path, target)", "os.replace(path, target)"),
        ],
        ["tests/sinks/test_parquet.py::test_an_output_of_another_key_is_never_replaced"],
    ),
    Mutant(
        "end of file as success",
        [
            Edit(
                "engine/bridge.py",
                "            kind, length = self._header(job)\n"
                "            if kind == FrameKind.BATCH",
                "            try:\n"
                "                kind, length = self._header(job)\n"
                "            except ConnectionResetError:\n"
                "                return ends\n"
                "            if kind == FrameKind.BATCH",
            )
        ],
        ["tests/engine/test_bridge.py::test_a_guest_that_dies"],
    ),
    Mutant(
        "deferred BEGIN",
        [Edit("db/schema.py", '"BEGIN IMMEDIATE"', '"BEGIN"')],
        ["tests/db/test_access.py::test_nobody_writes_between_our_look_and_our_change"],
    ),
    Mutant(
        "attempt in the output key",
        [
            Edit(
                "engine/dispatch.py",
                "job.artifact_hash, topic, uri)",
                "job.artifact_hash, topic, f'{uri}#{job.fence}')",
            )
        ],
        ["tests/engine/test_dispatch.py::test_every_attempt_has_the_same_output_key"],
    ),
    Mutant(
        "audit outside the transaction",
        [
            Edit(
                "engine/committer.py",
                "            audit.append(connection, ACTOR, events)\n"
                '            crashpoint("committer.completion_written")\n',
                "            later.extend(events)\n\n        later: list[audit.Event] = []\n",
            ),
            Edit(
                "engine/committer.py",
                "            await self._write(work)\n",
                "            await self._write(work)\n"
                "            await self._write(lambda c: audit.append(c, ACTOR, later))\n",
            ),
        ],
        [f"{_TRACED}[every commit leaves a ledger that holds]"],
    ),
    Mutant(
        "no racy rule",
        [Edit("services/scan.py", "racy = is_racy(looked, self.started)", "racy = False")],
        ["tests/services/test_scan.py::test_an_edit_within_the_clocks_granularity_is_found"],
    ),
    Mutant(
        "events only",
        [
            Edit(
                "services/watch.py",
                "if rung or self._next_scans.get(root.id, 0.0) <= time.monotonic():",
                "if False:",
            )
        ],
        ["tests/services/test_watch.py::test_the_schedule_finds_what_no_event_told"],
    ),
    Mutant(
        "mtime only",
        [
            Edit(
                "services/scan.py",
                "known.present and known.stat == stat",
                "known.present and known.stat.mtime_ns == stat.mtime_ns",
            )
        ],
        ["tests/services/test_scan.py::test_an_edit_long_after_is_found_by_more_than_its_mtime"],
    ),
    Mutant(
        "ledger row outside the transaction",
        [
            Edit(
                "engine/sinks/sqlite.py",
                '            crashpoint("sqlite.ledger_written")\n',
                '            connection.executescript("COMMIT; BEGIN IMMEDIATE; SAVEPOINT job")\n'
                '            crashpoint("sqlite.ledger_written")\n',
            )
        ],
        [f"{_SINKS}/test_sqlite_crashes.py::test_a_replacement_that_is_killed"],
    ),
    Mutant(
        "adopt without comparing",
        [
            Edit(
                "engine/sinks/sqlite.py",
                '"SELECT * FROM _cf_outputs WHERE output_key = ?", [output_key]',
                '"SELECT * FROM _cf_outputs WHERE output_key >= ?", [""]',
            )
        ],
        ["tests/sinks/test_contract.py::test_a_newer_version_takes_the_place_of_an_older_one"],
    ),
    Mutant(
        "late versions shown",
        [
            Edit(
                "engine/sinks/sqlite.py",
                "return greater.fetchone() is not None",
                "return False",
            )
        ],
        ["tests/sinks/test_contract.py::test_an_older_version_that_comes_late_shows_no_rows"],
    ),
    Mutant(
        "inventory without what is retracted",
        [Edit("engine/sinks/sqlite.py", "if output.retracted or ", "if ")],
        [
            "tests/sinks/test_contract.py::test_what_is_retracted_stays_so_when_it_is_published_again"
        ],
    ),
    Mutant(
        "replace what is newer",
        [
            Edit(
                "engine/sinks/parquet.py",
                "if first.order > (output.ordinal, output.job_id):",
                "if False:",
            )
        ],
        [
            f"{_SINKS}/test_contract.py::test_an_older_version_that_comes_late_shows_no_rows[parquet]"
        ],
    ),
    Mutant(
        "adopt other rows",
        [Edit("engine/sinks/parquet.py", " and first.told.rows == output.rows:", ":")],
        [f"{_SINKS}/test_parquet.py::test_whatever_is_in_the_way_stays[other rows]"],
    ),
    Mutant(
        "columns after the file",
        [
            Edit(
                "engine/sinks/parquet.py",
                "        if move.columns is not None:\n"
                "            parts.set_topic_columns(name.parent, move.columns)\n",
                "        if move.columns is not None:\n",
            ),
            Edit(
                "engine/sinks/parquet.py",
                "        return Published(target=str(target), rows=output.rows, digest=digest, ad",
                "        if move.columns is not None:\n"
                "            parts.set_topic_columns(name.parent, move.columns)\n"
                "        return Published(target=str(target), rows=output.rows, digest=digest, ad",
            ),
        ],
        [
            f"{_SINKS}/test_parquet_columns.py::test_the_columns_are_there_before_the_file_that_has_them"
        ],
    ),
    Mutant(
        "a cast that rounds",
        [
            Edit(
                "engine/sinks/topic_schema.py",
                "(pa.types.is_null(old.type) or _bits(new.cast(old.type)).equals(_bits(old)))",
                "True",
            )
        ],
        [f"{_SINKS}/test_topic_schema.py::test_a_value_that_would_change_is_refused"],
    ),
    Mutant(
        "SQL Server: ledger row outside the transaction",
        [
            Edit(
                "engine/sinks/mssql.py",
                '    crashpoint("mssql.ledger_written")\n',
                '    session._connection.commit()\n    crashpoint("mssql.ledger_written")\n',
            )
        ],
        [f"{_SERVER}[ledger_written]"],
    ),
    Mutant(
        "SQL Server: published without a look into the ledger",
        [
            Edit(
                "engine/sinks/mssql.py",
                "            done |= _adopted(aims)\n",
                "            pass\n",
            ),
            Edit("engine/sinks/mssql.py", "found = _adopted(aims)", "found = {}"),
        ],
        [f"{_SERVER}[committed]"],
    ),
    Mutant(
        "insert before ledger",
        [
            Edit(
                "engine/sinks/sqlite.py",
                "self._adopted(connection, output) or self._add(connection, output)",
                "self._add(connection, output)",
            ),
            Edit(
                "engine/sinks/sqlite.py",
                "INSERT INTO _cf_outputs",
                "INSERT OR IGNORE INTO _cf_outputs",
            ),
        ],
        [
            f"{_SINKS}/test_contract.py::"
            "test_a_second_attempt_with_the_same_key_adopts_the_first[sqlite]"
        ],
    ),
    Mutant(
        "replace in two transactions",
        [
            Edit(
                "engine/sinks/sqlite.py",
                """                self._replace(connection, output)
""",
                """                self._replace(connection, output)
"""
                + _COMMITTED,
            )
        ],
        [f"{_SINKS}/test_sqlite_crashes.py::test_a_replacement_that_is_killed"],
    ),
    Mutant(
        "retract without ledger",
        [
            Edit(
                "engine/sinks/sqlite.py",
                """    connection.execute(
        "UPDATE _cf_outputs SET state = ? WHERE output_key = ?", [state, record["output_key"]]
    )
""",
                "",
            )
        ],
        [
            f"{_SINKS}/test_contract.py::"
            "test_what_is_retracted_stays_so_when_it_is_published_again[sqlite]"
        ],
    ),
    Mutant(
        "adopt by name",
        [
            Edit(
                "engine/sinks/parquet.py",
                "if first.output_key == output.output_key and first.told.rows == output.rows:",
                "if first.told.rows == output.rows:",
            )
        ],
        [f"{_SINKS}/test_parquet_modes.py::test_the_versions_of_a_location_have_one_file"],
    ),
    Mutant(
        "exchange without looking",
        [
            Edit(
                "engine/sinks/parquet.py",
                "looked.append(self._settled(output) or ",
                "looked.append(",
            ),
            Edit(
                "engine/sinks/parquet.py",
                'self._there(output) if output.mode == "replace" else []',
                "[]",
            ),
            Edit("engine/sinks/parquet.py", "os.link(path, target)", "os.replace(path, target)"),
        ],
        [f"{_SINKS}/test_parquet_modes.py::test_what_is_not_of_the_slot_is_never_replaced"],
    ),
    Mutant(
        "topics of a job one by one",
        [
            Edit(
                "engine/sinks/sqlite.py",
                """                tables.insert_rows(connection, output.topic, staged)
""",
                """                tables.insert_rows(connection, output.topic, staged)
"""
                + _COMMITTED,
            )
        ],
        [f"{_SINKS}/test_sqlite_crashes.py::test_an_append_that_is_killed"],
    ),
    Mutant(
        "nothing replaces nothing",
        [
            Edit(
                "engine/runner.py", "for topic in plans.keys() - stages.keys():", "for topic in ():"
            )
        ],
        ["tests/cli/test_modes.py::test_a_history_under_replace_is_the_file_after_every_commit"],
    ),
]


def apply(mutant: Mutant, package: Path) -> None:
    """Seed a bug into a copy of the package.

    Raises:
        LookupError: what it edits is not there, or not once.
    """
    for file, old, new in mutant.edits:
        path = package / file
        text = path.read_text("utf-8")
        if text.count(old) != 1:
            found = text.count(old)
            raise LookupError(f"mutant {mutant.name!r} does not apply: {found} x in {file}: {old}")
        path.write_text(text.replace(old, new), "utf-8")
