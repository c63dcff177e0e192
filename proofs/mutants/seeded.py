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
_SERVER = "tests/sinks/test_mssql_crashes.py::test_the_first_outputs"
_DURABLE = f"{_TRACED}[what must be durable before what]"

_STANDING = "tests/services/test_standing.py"
_VISIBILITY = "tests/db/test_visibility.py"
_PROMISES = "tests/db/test_promises.py"
_REPLACE = "[sqlite-replace]"
_EDITS = "tests/db/test_edits.py::test_an_edit_is_named"

_COMMITTED = """\
            for words in ("RELEASE job", "COMMIT", "BEGIN IMMEDIATE", "SAVEPOINT job"):
                schema.send(words)
"""
"""Ends the SQLite sink's transaction where it must not end, and begins another one."""

_RECORDED = """\
            crashpoint("sql.recorded")
"""

MUTANTS = [
    Mutant(
        "no file fsync",
        [Edit("engine/sinks/parts.py", "        durable.fsync_path(file)\n", "")],
        [_DURABLE],
    ),
    Mutant(
        "a digest is saved whatever another scan has found meanwhile",
        [Edit("db/versions.py", "CASE WHEN digest IS ?", "CASE WHEN 1 OR digest IS ?")],
        [
            "tests/services/test_meanwhile.py::test_what_another_scan_saw_come_is_missed_when_it_goes"
        ],
    ),
    Mutant(
        "no directory fsync",
        [
            Edit(
                "engine/sinks/parquet_moves.py",
                '        durable.fsync_path(folder)\n        crashpoint("parquet.synced")\n',
                '        crashpoint("parquet.synced")\n',
            )
        ],
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
                "new = self._adopted(entry, there) if there else None",
                'new, there = None, ""',
            ),
            Edit(
                "engine/sinks/parquet_moves.py",
                "os.link(source, target)",
                "os.replace(source, target)",
            ),
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
                "key_of(*key, topic, uri, *rebuilt)",
                "key_of(*key, topic, f'{uri}#{job.fence}', *rebuilt)",
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
                "self.scan_within(max(self._interval(), rest))",
                "pass",
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
        [Edit("engine/sinks/sql_sink.py", _RECORDED, _COMMITTED + _RECORDED)],
        [f"{_SINKS}/test_sqlite_crashes.py::test_a_replacement_that_is_killed"],
    ),
    Mutant(
        "adopt without comparing",
        [
            Edit(
                "engine/sinks/sql.py",
                """f"WHERE {self.quote('output_key')} = ?", key)""",
                """f"WHERE {self.quote('output_key')} >= ?", "")""",
            )
        ],
        [
            f"{_SINKS}/test_contract.py::"
            "test_a_newer_version_takes_the_place_of_an_older_one[sqlite]"
        ],
    ),
    Mutant(
        "past versions shown under replace",
        [Edit("engine/sinks/sql.py", " AND o.mode <> 'replace')", ")")],
        [
            f"{_SINKS}/test_contract.py::"
            "test_a_newer_version_takes_the_place_of_an_older_one[sqlite]"
        ],
    ),
    Mutant(
        "records without what is retracted",
        [
            Edit(
                "engine/sinks/sql_sink.py",
                'if not is_known or record["state"] == State.RETRACTED:',
                "if not is_known:",
            )
        ],
        [
            f"{_SINKS}/test_contract.py::"
            "test_records_have_the_facts_of_outputs_that_the_ledger_does_not_know[sqlite]"
        ],
    ),
    Mutant(
        "adopt other rows",
        [
            Edit(
                "engine/sinks/parquet.py",
                "(entry.output_key, entry.rows)",
                "(entry.output_key, footer.rows)",
            )
        ],
        [f"{_SINKS}/test_parquet.py::test_whatever_is_in_the_way_stays[other rows]"],
    ),
    Mutant(
        "columns after the file",
        [
            Edit(
                "engine/sinks/parquet.py",
                "                parts.set_topic_columns(place, columns)\n",
                "",
            ),
            Edit(
                "engine/sinks/parquet.py",
                "            self.gone.update(parquet_moves.settle(self._root, self.record))\n",
                "            self.gone.update(parquet_moves.settle(self._root, self.record))\n"
                "            for folder, (columns, _) in self._found.items():\n"
                "                parts.set_topic_columns(self._root / folder, columns)\n",
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
        "SQL Server: rows outside the transaction",
        [
            Edit(
                "engine/sinks/mssql_tables.py",
                "        if staged.table:\n",
                "        self.session._connection.commit()\n        if staged.table:\n",
            )
        ],
        [_SERVER],
    ),
    Mutant(
        "SQL Server: loaded without a look into the ledger",
        [
            Edit(
                "engine/sinks/mssql.py",
                "if not schema_of(output.location).record(output.output_key):",
                "if output:",
            ),
            Edit(
                "engine/sinks/sql_sink.py",
                "found = schema.record(output.output_key)",
                "found = None",
            ),
        ],
        [_SERVER],
    ),
    Mutant(
        "show what is not whole",
        [Edit("engine/sinks/sql_sink.py", "schema.check_whole(record)", "pass")],
        [
            f"{_SINKS}/test_contract.py::"
            "test_nothing_changes_if_an_output_that_is_to_be_visible_is_not_whole[sqlite]"
        ],
    ),
    Mutant(
        "replace in two transactions",
        [
            Edit(
                "engine/sinks/sql_sink.py",
                "    change_outputs(schema_of, job.changes, fitted=job.outputs)\n",
                "    if job.changes:\n"
                + _COMMITTED
                + "    change_outputs(schema_of, job.changes, fitted=job.outputs)\n",
            )
        ],
        [f"{_SINKS}/test_sqlite_crashes.py::test_a_replacement_that_is_killed"],
    ),
    Mutant(
        "a change that is not written",
        [Edit("engine/sinks/sql.py", "if changed != record:", "if not record:")],
        [
            f"{_SINKS}/test_contract.py::"
            "test_a_newer_version_takes_the_place_of_an_older_one[sqlite]"
        ],
    ),
    Mutant(
        "adopt by name",
        [Edit("engine/sinks/parquet.py", "(entry.output_key, entry.rows)", "(key, entry.rows)")],
        [f"{_SINKS}/test_parquet.py::test_an_output_of_another_key_is_never_replaced"],
    ),
    Mutant(
        "exchange without looking",
        [
            Edit(
                "engine/sinks/parquet.py",
                "if os.path.lexists(path) and not parts.names(path, entry.output_key):",
                "if False:",
            )
        ],
        [
            f"{_SINKS}/test_parquet_modes.py::"
            "test_a_file_that_somebody_put_in_the_place_of_ours_is_not_moved"
        ],
    ),
    Mutant(
        "exchange in two steps",
        [
            Edit(
                "engine/sinks/parquet_moves.py",
                "        os.replace(source, target)\n",
                "        os.unlink(target)\n        os.replace(source, target)\n",
            )
        ],
        [f"{_SINKS}/test_parquet_modes.py::test_a_name_is_never_without_a_file"],
    ),
    Mutant(
        "topics of a job one by one",
        [
            Edit(
                "engine/sinks/sql_sink.py",
                '                crashpoint("sql.rows_loaded")\n',
                _COMMITTED + '            crashpoint("sql.rows_loaded")\n',
            )
        ],
        [f"{_SINKS}/test_sqlite_crashes.py::test_an_append_that_is_killed"],
    ),
    # What stands, and who is told.
    Mutant(
        "the artifact deployed first stands",
        [
            Edit(
                "db/visibility.py",
                "return one.is_active, one.deployed, one.job_id",
                "return one.is_active, -one.deployed, one.job_id",
            )
        ],
        [
            f"{_VISIBILITY}::test_where_the_active_artifact_has_none_that_of_the_last_deployment_stands"
        ],
    ),
    Mutant(
        "the active artifact is like any other",
        [
            Edit(
                "db/visibility.py",
                "return one.is_active, one.deployed, one.job_id",
                "return True, one.deployed, one.job_id",
            )
        ],
        [f"{_STANDING}::test_a_plugin_that_is_rolled_back_shows_its_rows_at_once{_REPLACE}"],
    ),
    Mutant(
        "a retraction keeps no place",
        [
            Edit(
                "db/visibility.py",
                "if one.ordinal > newest.get(one.slot, 0):",
                "if not one.is_retracted and one.ordinal > newest.get(one.slot, 0):",
            )
        ],
        [f"{_STANDING}::test_a_retraction_belongs_to_a_version{_REPLACE}"],
    ),
    Mutant(
        "what gave nothing takes no place",
        [
            Edit(
                "engine/runner.py",
                "        for plan in ran.job.outputs\n        if plan.output_key not in given",
                "        for plan in ()\n        if plan.output_key not in given",
            )
        ],
        [f"{_STANDING}::test_a_version_without_rows_takes_its_place{_REPLACE}"],
    ),
    Mutant(
        "hidden outputs are told to be past",
        [
            Edit(
                "db/visibility.py",
                "        states[one.output_id] = State.HIDDEN\n",
                "        states[one.output_id] = State.PAST\n",
            )
        ],
        [f"{_STANDING}::test_the_good_bytes_published_again_are_a_label[parquet-append]"],
    ),
    Mutant(
        "the mode of a topic is ignored",
        [
            Edit(
                "db/visibility.py",
                "modes.get((plugin, topic, uri), known_mode or mode)",
                "known_mode or mode",
            )
        ],
        [f"{_STANDING}::test_a_mode_is_what_is_shown{_REPLACE}"],
    ),
    Mutant(
        "a query counts each sink apart",
        [Edit("db/visibility.py", "row[0], row[1:4], row[5]", "row[0], row[1:5], row[5]")],
        [f"{_VISIBILITY}::test_what_stands_is_what_the_rules_say"],
    ),
    Mutant(
        "expiry takes what stands",
        [
            Edit(
                "db/visibility.py",
                "state = 'hidden' AND changed_at <= ?",
                "state IN ('hidden', 'current') AND changed_at <= ?",
            )
        ],
        [f"{_VISIBILITY}::test_what_does_not_stand_is_removed_in_time"],
    ),
    Mutant(
        "what is published takes no place",
        [
            Edit(
                "db/debts.py",
                "changes=outputs(draft.changes)),\n            list(draft.outputs), "
                "list(draft.changes),",
                "changes=[]),\n            list(draft.outputs), [],",
            )
        ],
        [f"{_VISIBILITY}::test_jobs_of_one_group_are_published_as_if_one_after_another"],
    ),
    Mutant(
        "debts are told by nobody",
        [Edit("engine/committer.py", "            await self._tell()\n", "")],
        [f"{_STANDING}::test_a_sink_that_was_away_is_told_later{_REPLACE}"],
    ),
    # Files of the Parquet sink.
    Mutant(
        "replaced without a second name",
        [Edit("engine/sinks/parquet_moves.py", "os.link(name, kept)", "pass")],
        [f"{_SINKS}/test_parquet_modes.py::test_a_name_is_never_without_a_file"],
    ),
    Mutant(
        "moved is said before the files move",
        [
            Edit(
                "engine/sinks/parquet_moves.py",
                "        return []\n    leaving = {",
                "        return []\n    record.settled([], [])\n    leaving = {",
            )
        ],
        [f"{_SINKS}/test_parquet_crashes.py::test_what_is_killed_goes_on[replace]"],
    ),
    # The bytes of contents.
    Mutant(
        "the ledger has a content before the store",
        [
            Edit("services/store.py", "self._small.add(rows)", "self._late = rows"),
            Edit(
                "services/store.py",
                '            yield batch\n            crashpoint("store.recorded")\n',
                '            yield batch\n            crashpoint("store.recorded")\n'
                '            self._small.add(getattr(self, "_late", []))\n',
            ),
        ],
        [
            "tests/services/test_store.py::test_killed_at_any_point_the_next_scan_finds_all_and_"
            "no_version_claims_what_is_not_there[store.recorded]"
        ],
    ),
    Mutant(
        "evict what a queued job needs",
        [
            Edit("db/kept.py", "WHERE content_hash NOT IN ({_NEEDED})", "WHERE 1"),
            Edit("db/kept.py", " AND content_hash NOT IN ({_NEEDED})", ""),
        ],
        [
            "tests/services/test_store.py::"
            "test_room_is_made_by_old_contents_then_by_the_oldest_and_never_by_a_jobs[10240]"
        ],
    ),
    # What `verify` finds.
    Mutant(
        "verify misses a file without its job",
        [Edit("db/promises.py", "if wanted.plugin_name not in known[row.id]:", "if False:")],
        [f"{_PROMISES}::test_a_present_file_without_its_job_is_named"],
    ),
    Mutant(
        "verify misses rows that nobody sees",
        [Edit("db/promises.py", "WHEN NOT stand AND NOT forgotten", "WHEN 0")],
        [f"{_PROMISES}::test_a_finding_names_file_plugin_and_job"],
    ),
    Mutant(
        "verify misses rows that are there twice",
        [Edit("db/promises.py", "WHEN stand > 1 OR (is_current AND currents > 1)", "WHEN 0")],
        [f"{_PROMISES}::test_a_finding_names_file_plugin_and_job"],
    ),
    Mutant(
        "verify holds a sink to what it was told before",
        [Edit("services/verify.py", "not list(sink.check(after))", "False")],
        [f"{_STANDING}::test_a_sink_may_know_already_what_it_is_owed{_REPLACE}"],
    ),
    # What `verify` finds that somebody edited.
    Mutant(
        "a removed row of the setup is not missed",
        [
            Edit(
                "db/integrity.py",
                "    if values is None:\n        if is_there:",
                "    if values is None:\n        if 0:",
            )
        ],
        [f"{_EDITS}[a rule removed]", f"{_EDITS}[a retraction removed]"],
    ),
    Mutant(
        "a row of the setup may be removed and made again",
        [Edit("db/integrity.py", "if bool(entry.was) != is_there:", "if 0:")],
        ["tests/db/test_edits.py::test_a_row_removed_and_made_again_is_named_for_ever"],
    ),
    Mutant(
        "a row of the setup is only counted",
        [Edit("db/integrity.py", "if not same or values[last", "if values[last")],
        [f"{_EDITS}[01 an older version is active]", f"{_EDITS}[18 the Gatekeeper's verdict]"],
    ),
    Mutant(
        "locations are only counted",
        [
            Edit(
                "db/integrity.py",
                "if block_digest(rows) == hashed:",
                "if len(rows) > last - first:",
            )
        ],
        [f"{_EDITS}[21 a location's path]"],
    ),
    Mutant(
        "a planted trigger is taken for a user's",
        [Edit("db/integrity.py", 'made.kind != "index" or ', "")],
        [f"{_EDITS}[38 a trigger that activates]", f"{_EDITS}[43 a trigger that adds a rule]"],
    ),
    Mutant(
        "nobody misses a trigger",
        [Edit("db/integrity.py", "for kind, name in wanted:", "for kind, name in ():")],
        [f"{_EDITS}[41 no protective trigger]"],
    ),
    Mutant(
        "what a session changes is in no seal",
        [Edit("db/access.py", "        seals.seal_session(raw)\n", "        pass\n")],
        ["tests/db/test_edits.py::test_what_users_change_in_their_sessions_is_sealed"],
    ),
    Mutant(
        "an activated version runs with any bytes",
        [Edit("db/plugins.py", "if activated != plugin.artifact_hash:", "if 0:")],
        [
            "tests/db/test_tampering.py::"
            "test_a_version_that_was_activated_runs_with_those_bytes_only"
        ],
    ),
    Mutant(
        "a file that comes back gets no job",
        [Edit("db/versions.py", "    for s, state in back:\n", "    for s, state in ():\n")],
        [f"{_PROMISES}::test_a_file_that_comes_back_goes_to_the_plugins_of_now"],
    ),
    # Moves.
    Mutant(
        "a move is recorded when the scan has ended",
        [Edit("services/scan.py", "self.vanished.follow(connection, sightings)", "Settled()")],
        ["tests/services/test_moves.py::test_no_job_of_a_new_name_is_seen_before_the_move_is"],
    ),
    Mutant(
        "an inode says where a file went",
        [Edit("db/moves.py", "made is not None and made <= cast(int, last)", "True")],
        [
            "tests/services/test_moves.py::"
            "test_a_new_file_with_the_inode_of_a_deleted_one_is_no_move"
        ],
    ),
    Mutant(
        "a moved file shows at both places",
        [Edit("db/visibility.py", "(one.is_withdrawn or one.has_moved)", "one.is_withdrawn")],
        ["tests/cli/test_moves.py::test_a_folder_that_is_renamed_takes_its_rows_along[sqlite]"],
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
