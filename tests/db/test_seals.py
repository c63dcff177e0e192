"""Every byte of every row of versions, attempts, outputs, jobs and audit: altered, it is named."""

from __future__ import annotations

import json
import random
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from casparian_flow.config import Settings
from casparian_flow.db import audit, seals
from casparian_flow.db.access import open_ledger
from casparian_flow.db.seals import SEALED_TABLES
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.db.real_ledger import Altered, attacker, said, worked

SEED = 20
TABLES = {table.one: table.sql_name for table in SEALED_TABLES}
LASTING = "('COMPLETED', 'FAILED', 'ABORTED', 'SUPERSEDED')"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return worked(tmp_path_factory.mktemp("sealed"))


@pytest.fixture(scope="module")
def altered(real: Settings) -> Iterator[Altered]:
    ledger = Altered(real)
    yield ledger
    ledger.close()


def others(value: Any, choose: random.Random) -> list[Any]:
    """Values that differ by as little as can be, and one of another type."""
    match value:
        case None:
            return ["", 0]
        case int():
            return [value ^ 1 << choose.randrange(20, 40), str(value) + "x"]
        case float():
            (bits,) = struct.unpack("q", struct.pack("d", value))
            return [struct.unpack("d", struct.pack("q", bits ^ 1))[0], "none"]
        case bytes():
            where = choose.randrange(len(value)) if value else 0
            turned = bytearray(value or b"\0")
            turned[where] ^= 1 << choose.randrange(8)
            return [bytes(turned), value + b"\0"]
    raise AssertionError(value)


def test_what_nobody_touched_holds(real: Settings) -> None:
    with open_ledger(real.database) as ledger:
        assert ledger.read(said) == []
        verdict = verify(real, ledger)
    assert (verdict.problems, verdict.notes) == ([], [])
    assert verdict.checked["outputs"] == 2


@pytest.mark.parametrize("one", TABLES)
def test_any_byte_of_any_row_is_named(altered: Altered, one: str) -> None:
    choose = random.Random(SEED)
    table = TABLES[one]
    columns = [row[1] for row in altered.rows(f"PRAGMA table_info({table})")]
    which = f"WHERE status IN {LASTING}" if one == "job" else ""
    tried = 0
    for (row_id,) in altered.rows(f"SELECT id FROM {table} {which}"):
        for column in columns:
            exactly = f"CASE typeof({column}) WHEN 'text' THEN CAST({column} AS BLOB) ELSE {column}"
            ((value,),) = altered.rows(f"SELECT {exactly} END FROM {table} WHERE id = {row_id}")
            new = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
            changes = [(new, other) for other in others(value, choose)]
            if isinstance(value, bytes):
                changes.append(("?", value))  # the same bytes, and text no more
            for form, other in changes:
                if column == "id" and not isinstance(other, int):
                    continue  # SQLite takes whole numbers only
                words = altered.after(
                    (f"UPDATE {table} SET {column} = {form} WHERE id = ?", (other, row_id))
                )
                assert any(w.startswith(f"{one} {row_id} ") for w in words), (column, other, words)
                tried += 1
    assert tried > 30, tried


def test_any_byte_of_any_row_of_the_audit_is_named(altered: Altered) -> None:
    choose = random.Random(SEED)
    columns = ("at", "actor", "action", "subject", "detail", "previous", "hash")
    for (seq,) in altered.rows("SELECT seq FROM cf_audit"):
        for column in columns:
            query = f"SELECT CAST({column} AS BLOB) FROM cf_audit WHERE seq = {seq}"
            ((value,),) = altered.rows(query)
            changes = [("CAST(? AS TEXT)", other) for other in others(value, choose)]
            for form, other in [*changes, ("?", value)]:
                change = (f"UPDATE cf_audit SET {column} = {form} WHERE seq = ?", (other, seq))
                assert f"audit row {seq} was changed" in altered.after(change, replayed=False)
        words = altered.after(
            f"UPDATE cf_audit SET seq = 100000 + seq WHERE seq = {seq}", replayed=False
        )
        assert f"audit row {seq} is missing" in words
    assert seq > 10


@pytest.mark.parametrize("one", TABLES)
def test_a_row_that_is_gone_added_or_exchanged_is_named(altered: Altered, one: str) -> None:
    table = TABLES[one]
    rows = altered.rows(f"SELECT id FROM {table} ORDER BY id")
    columns = [row[1] for row in altered.rows(f"PRAGMA table_info({table})")][1:]
    listed = ", ".join(columns)
    for (row_id,) in rows:
        words = altered.after(f"DELETE FROM {table} WHERE id = {row_id}")
        assert any(w.startswith(f"{one} {row_id} was deleted outside") for w in words), words
    for forged in (rows[-1][0] + 1, 10**12, -3):
        unique = {"job_id": "job_id + 1000", "location_id": "location_id + 1000"}
        unique["plugin_id"] = "plugin_id + 1000"
        values = ", ".join(unique.get(name, name) for name in columns)
        words = altered.after(
            f"INSERT INTO {table} (id, {listed}) SELECT {forged}, {values} FROM {table} LIMIT 1"
        )
        assert (
            f"{one} {forged} was inserted outside Casparian Flow: it has no audit record" in words
        )
    first, second = rows[0][0], rows[1][0]
    words = altered.after(
        *(
            f"UPDATE {table} SET id = {new} WHERE id = {old}"
            for old, new in ((first, -1), (second, first), (-1, second))
        )
    )
    assert any(w.startswith(f"{one} {first} ") for w in words)
    assert any(w.startswith(f"{one} {second} ") for w in words)


def test_a_job_that_waits_keeps_its_identity_status_and_fence(altered: Altered) -> None:
    job, *_ = altered.rows("SELECT id FROM cf_processing_queue WHERE status = 'QUEUED'")[0]
    for change in (
        "status = 'ABORTED'", "fence = 7", "file_version_id = 99", "plugin_name = 'other'",
        "plugin_id = 9", "created_at = '2000-01-01 00:00:00'",
    ):  # fmt: skip
        words = altered.after(f"UPDATE cf_processing_queue SET {change} WHERE id = {job}")
        assert any(w.startswith(f"job {job} ") for w in words), change
    words = altered.after(f"UPDATE cf_processing_queue SET reason = 'x' WHERE id = {job}")
    assert words == []  # why it waits is not sealed before it ends


def test_a_second_seal_does_not_make_an_alteration_good(altered: Altered) -> None:
    """An attacker who knows how seals are made adds one for what was altered."""
    ((seq, hashed),) = altered.rows("SELECT seq, hash FROM cf_audit ORDER BY seq DESC LIMIT 1")
    ((subject, detail),) = altered.rows(
        "SELECT subject, detail FROM cf_audit "
        "WHERE action = 'seal' AND detail LIKE '%\"versions\"%' ORDER BY seq LIMIT 1"
    )
    event = seals.Event("seal", subject, json.loads(detail))
    (row,) = seals.link(seals.Head(seq, hashed), "ledger", [event])
    marks = ", ".join("?" * len(row))
    words = altered.after(
        (f"INSERT INTO cf_audit ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
    )
    assert any(w.startswith("version ") and "was created twice" in w for w in words)
    assert any(w.startswith("locations ") and "were created twice" in w for w in words)
    assert any(w.startswith("job 1 is moved from nothing by audit row ") for w in words)


def test_a_seal_that_makes_no_sense_is_named_and_not_believed(altered: Altered) -> None:
    for detail in (
        "", "[]", '{"versions": {"moves": [[1, 99999999999, "", "", 0]]}}', b"\xff",
        '{"locations": {"blocks": [[1, 99999999999, ""]]}}',
    ):  # fmt: skip
        words = altered.after(("UPDATE cf_audit SET detail = ? WHERE action = 'seal'", (detail,)))
        assert any("is a seal that cannot be read" in w for w in words)
        assert "version 1 was inserted outside Casparian Flow: it has no audit record" in words


def test_an_end_that_was_cut_off_leaves_rows_without_a_seal(
    real: Settings, altered: Altered
) -> None:
    """Whoever noted the head sees the cut itself; anybody sees what it had sealed."""
    with open_ledger(real.database) as ledger:
        noted = ledger.read(audit.head)
    words = altered.after(f"DELETE FROM cf_audit WHERE seq > {noted.seq - 1}")
    assert any(w.startswith("version ") and w.endswith("it has no audit record") for w in words)


def test_verify_says_it_in_words_whatever_was_written(
    real: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes that are no text, numbers that are none: names, and never a traceback."""
    settings = worked_copy(real, tmp_path_factory)
    with attacker(settings) as other:
        other.execute("UPDATE cf_output SET rows = 'many', location = x'ff' WHERE id = 1")
        other.execute("UPDATE cf_output SET digest = CAST(x'ff' AS TEXT) WHERE id = 2")
        other.execute("UPDATE cf_file_location SET rel_path = CAST(x'ff' AS TEXT)")
        other.execute("UPDATE cf_file_location SET current_version_id = 'none' WHERE id = 1")
        other.execute("UPDATE cf_audit SET at = 17, actor = x'00' WHERE seq = 3")
        other.execute("UPDATE cf_attempt SET log = CAST(x'c328' AS TEXT) WHERE id = 1")
    with open_ledger(settings.database) as ledger:
        words = verify(settings, ledger).problems
    for named in (
        "output 1 was changed outside Casparian Flow",
        "output 2 was changed outside Casparian Flow since it became PUBLISHED",
        "audit row 3 was changed", "attempt 1 was changed outside Casparian Flow",
    ):  # fmt: skip
        assert named in words
    assert any(w.startswith("location 1 (") for w in words)


def test_a_damaged_page_is_named_and_the_rest_is_checked(
    real: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = worked_copy(real, tmp_path_factory)
    with attacker(settings) as other:
        other.execute("UPDATE cf_output SET topic = 'other' WHERE id = 1")
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ((page, size),) = other.execute(
            "SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size "
            "WHERE name = 'cf_attempt'"
        )
    with settings.database.path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(random.Random(SEED).randbytes(size))
    with open_ledger(settings.database) as ledger:
        words = verify(settings, ledger).problems
    assert any(w.startswith("the attempts cannot be read to the end") for w in words)
    assert len(set(words)) == len(words)
    assert "output 1 was changed outside Casparian Flow" in words


def worked_copy(real: Settings, folders: pytest.TempPathFactory) -> Settings:
    """The same ledger in a folder of its own."""
    settings = write_config(folders.mktemp("copy"))
    with (
        closing(sqlite3.connect(real.database.path)) as old,
        closing(sqlite3.connect(settings.database.path)) as new,
    ):
        old.backup(new)
    return settings
