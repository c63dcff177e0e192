"""Reading beside writing: sessions of users, group commit, and a ledger that cannot be written."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.orm import Session

from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.db.access import Connection, Ledger, get_engine, open_ledger
from casparian_flow.db.models import RoutingRule, SourceRoot
from casparian_flow.errors import LedgerError
from casparian_flow.services import backup
from casparian_flow.services.verify import verify
from tests.eventually import PATIENCE


def add_rule(connection: Connection, pattern: str) -> None:
    connection.execute(insert(RoutingRule).values(pattern=pattern, tag="t", priority=0))


def rules(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(RoutingRule)).scalar_one()


def test_a_session_that_has_read_may_write_after_others_wrote(
    ledger: Ledger, settings: Settings
) -> None:
    engine = get_engine(settings.database)
    with Session(engine) as session:
        assert session.query(SourceRoot).first() is None
        ledger.write(lambda c: add_rule(c, "*.csv"))
        session.add(RoutingRule(pattern="*.tsv", tag="t", priority=0))
        session.commit()
        assert session.query(RoutingRule).count() == 2
    engine.dispose()


def test_readers_do_not_wait_for_a_writer(ledger: Ledger) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        add_rule(connection, "*.csv")
        inside.set()
        assert release.wait(PATIENCE)

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(ledger.write, slow)
        assert inside.wait(PATIENCE)
        assert ledger.read(rules) == 0
        release.set()
        writing.result()
    assert ledger.read(rules) == 1


def test_one_failing_request_does_not_undo_those_it_shared_a_transaction_with(
    ledger: Ledger,
) -> None:
    holding, release = threading.Event(), threading.Event()

    def hold(_connection: Connection) -> None:
        holding.set()
        assert release.wait(PATIENCE)

    def fail(connection: Connection) -> None:
        add_rule(connection, "bad")
        raise ValueError("no")

    with ThreadPoolExecutor(4) as pool:
        pool.submit(ledger.write, hold)
        assert holding.wait(PATIENCE)
        good = pool.submit(ledger.write, lambda c: add_rule(c, "good"))
        bad = pool.submit(ledger.write, fail)
        release.set()
        good.result()
        with pytest.raises(ValueError, match="no"):
            bad.result()
    assert ledger.read(rules) == 1


def test_a_failing_request_alone_leaves_nothing(ledger: Ledger, settings: Settings) -> None:
    def fail(connection: Connection) -> None:
        add_rule(connection, "bad")
        raise ValueError("no")

    for n in range(2):  # the first transaction of a connection, and a later one
        with pytest.raises(ValueError, match="no"):
            ledger.write(fail)
        ledger.write(lambda c, n=n: add_rule(c, f"good {n}"))
    assert ledger.read(rules) == 2
    assert verify(settings, ledger).problems == []


def test_ddl_rolls_back_with_its_transaction(ledger: Ledger) -> None:
    def create_and_fail(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE passing (x)"))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ledger.write(create_and_fail)
    found = ledger.read(
        lambda c: c.execute(text("SELECT 1 FROM sqlite_schema WHERE name = 'passing'")).first()
    )
    assert found is None


def test_a_full_disk_is_an_error_in_words_and_writes_nothing(ledger: Ledger) -> None:
    def overflow(connection: Connection) -> None:
        connection.execute(text("PRAGMA max_page_count = 1"))
        for n in range(2000):
            add_rule(connection, f"{n}" * 50)

    with pytest.raises(LedgerError, match="could not be written"):
        ledger.write(overflow)
    ledger.write(lambda c: c.execute(text("PRAGMA max_page_count = 1000000")).all())
    assert ledger.read(rules) == 0


def test_the_log_is_checkpointed_while_we_write(ledger: Ledger, settings: Settings) -> None:
    def bulk(connection: Connection) -> None:
        for n in range(300):
            connection.execute(
                insert(RoutingRule).values(pattern=f"{n}" + "x" * 50_000, tag="t", priority=0)
            )

    ledger.write(bulk)
    assert settings.database.path.stat().st_size > 10 << 20
    assert settings.database.path.with_name("casparian_flow.sqlite3-wal").stat().st_size < 4 << 20


def test_processes_take_turns(ledger: Ledger, settings: Settings) -> None:
    code = (
        "import sys\n"
        "from sqlalchemy.orm import Session\n"
        "from casparian_flow.config import DatabaseSettings\n"
        "from casparian_flow.db.access import get_engine\n"
        "from casparian_flow.db.models import RoutingRule\n"
        "engine = get_engine(DatabaseSettings(db_location=sys.argv[1]))\n"
        "for n in range(50):\n"
        "    with Session(engine) as session:\n"
        "        session.query(RoutingRule).count()\n"
        "        session.add(RoutingRule(pattern=f'{sys.argv[2]}-{n}', tag='t', priority=0))\n"
        "        session.commit()\n"
        "engine.dispose()\n"
    )
    crowd = [
        subprocess.Popen([sys.executable, "-c", code, str(settings.database.path), str(n)])
        for n in range(4)
    ]
    for n in range(50):
        ledger.write(lambda c, n=n: add_rule(c, f"here-{n}"))
    assert [one.wait() for one in crowd] == [0] * 4
    assert ledger.read(rules) == 250


def test_a_waiter_that_is_cancelled_takes_nothing_with_it(ledger: Ledger) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        inside.set()
        assert release.wait(PATIENCE)
        add_rule(connection, "*.csv")

    async def story() -> None:
        waiting = asyncio.create_task(ledger.write_soon(slow))
        await asyncio.to_thread(inside.wait, 10)
        waiting.cancel()
        release.set()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    asyncio.run(story())
    ledger.write(lambda c: add_rule(c, "*.tsv"))
    assert ledger.read(rules) == 2


def test_a_foreign_lock_is_an_error_in_words_and_passes(ledger: Ledger, settings: Settings) -> None:
    ledger.write(lambda c: c.execute(text("PRAGMA busy_timeout = 50")).all())
    foreign = sqlite3.connect(settings.database.path, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        ledger.write(lambda c: add_rule(c, "*.csv"))
    assert ledger.failing is not None
    foreign.execute("ROLLBACK")
    foreign.close()
    ledger.write(lambda c: add_rule(c, "*.csv"))
    assert ledger.read(rules) == 1
    assert ledger.failing is None


def test_nobody_writes_between_our_look_and_our_change(ledger: Ledger, settings: Settings) -> None:
    foreign = sqlite3.connect(
        settings.database.path, isolation_level=None, timeout=0, check_same_thread=False
    )

    def look_then_change(connection: Connection) -> str:
        words = f"{rules(connection)} rules"
        try:
            foreign.execute("INSERT INTO cf_routing_rule (pattern, tag, priority) VALUES (1, 1, 0)")
        except sqlite3.OperationalError as error:
            words = str(error)
        add_rule(connection, "*.csv")
        return words

    assert "locked" in ledger.write(look_then_change)
    foreign.close()
    assert ledger.read(rules) == 1


def test_a_database_that_cannot_be_opened_is_an_error_in_words_and_passes(
    ledger: Ledger, settings: Settings
) -> None:
    gate = settings.database.gate
    gate.rename(gate.with_suffix(".away"))
    gate.mkdir()  # whoever opens it as a file is refused, root too
    with pytest.raises(LedgerError, match="directory"):
        ledger.write(lambda c: add_rule(c, "*.csv"))
    with pytest.raises(LedgerError, match="directory"):
        ledger.read(rules)
    gate.rmdir()
    ledger.write(lambda c: add_rule(c, "*.csv"))
    assert ledger.read(rules) == 1


def held(database: DatabaseSettings) -> list[str]:
    """Files of the ledger that this process has open, its gate among them."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own is gone by now
            found.append(str(entry.readlink()))
    ours = (str(database.path), str(database.gate))
    return [name for name in found if name.startswith(ours)]


def refused_gate(database: DatabaseSettings) -> None:
    database.gate.unlink()
    database.gate.mkdir()


def damaged(database: DatabaseSettings) -> None:
    database.path.write_bytes(b"no database" + database.path.read_bytes()[11:])


@pytest.mark.parametrize("harm", [refused_gate, damaged])
def test_a_connection_that_cannot_be_made_ready_is_closed(
    settings: Settings, harm: Callable[[DatabaseSettings], None]
) -> None:
    with open_ledger(settings.database) as ledger:
        harm(settings.database)
        with pytest.raises(LedgerError) as read:
            ledger.read(rules)
        with pytest.raises(LedgerError) as written:
            ledger.write(rules)
        with pytest.raises(LedgerError) as opened:
            get_engine(settings.database)
        # While they are alive, so is every connection that their frames know.
        assert all((read, written, opened))
        assert held(settings.database) == []


def test_a_read_that_outlives_the_ledger_closes_its_connection(settings: Settings) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(connection: Connection) -> int:
        inside.set()
        assert release.wait(PATIENCE)
        return rules(connection)

    with ThreadPoolExecutor(1) as pool:
        with open_ledger(settings.database) as ledger:
            reading = pool.submit(ledger.read, slow)
            assert inside.wait(PATIENCE)
        assert held(settings.database)
        release.set()
        assert reading.result() == 0
    assert held(settings.database) == []


def test_a_script_that_disposes_of_nothing_closes_its_connections_at_its_end(
    settings: Settings,
) -> None:
    code = (
        "import sys\n"
        "from sqlalchemy import text\n"
        "from casparian_flow.config import DatabaseSettings\n"
        "from casparian_flow.db import access, schema\n"
        "engine = access.get_engine(DatabaseSettings(db_location=sys.argv[1]))\n"
        "schema.crashpoint = print\n"
        "with engine.connect() as opened:\n"
        "    opened.execute(text('SELECT 1'))\n"
        "print('end')\n"
    )
    command = [sys.executable, "-X", "dev", "-c", code, str(settings.database.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["end", "connection.closed"]
    assert done.stderr == ""


def test_a_closed_ledger_says_so(settings: Settings) -> None:
    with open_ledger(settings.database) as ledger:
        pass
    with pytest.raises(LedgerError, match="closed"):
        ledger.write(rules)


@pytest.mark.parametrize(
    "statement",
    [
        "WITH x AS (SELECT 1) INSERT INTO cf_routing_rule (pattern, tag, priority) "
        "SELECT '*.txt', 't', 0 FROM x",
        "-- a word before\nINSERT INTO cf_routing_rule (pattern, tag, priority) VALUES ('x','t',0)",
        "/* and */ UPDATE cf_routing_rule SET priority = 1",
        "DROP INDEX IF EXISTS ix_nothing",
    ],
)
def test_every_statement_that_writes_takes_its_turn(
    ledger: Ledger, settings: Settings, statement: str
) -> None:
    """A session that has read would else be told that the database is locked."""
    engine = get_engine(settings.database)
    with engine.connect() as connection:
        connection.execute(text("WITH x AS (SELECT 1) SELECT * FROM x"))
        ledger.write(lambda c: add_rule(c, "*.csv"))
        connection.execute(text(statement))
        connection.commit()
    engine.dispose()


def test_a_session_without_transactions_is_refused(settings: Settings) -> None:
    """SQLAlchemy would not commit, so that its writes would be lost without a word."""
    engine = get_engine(settings.database)
    with (
        engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection,
        pytest.raises(LedgerError),
    ):
        connection.execute(insert(RoutingRule).values(pattern="*", tag="t"))
    engine.dispose()


@pytest.mark.parametrize("name", ["a?b", "a%41b", "a#b", "a&mode=ro"])
def test_any_folder_may_hold_a_ledger(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    settings = Settings(database=DatabaseSettings(db_location=str(folder / "l.sqlite3")))
    with open_ledger(settings.database) as ledger:
        ledger.write(lambda c: add_rule(c, "*.csv"))
        made = backup.make(settings, ledger, str(folder / "copy?.sqlite3"))
    assert made.path == str(folder / "copy?.sqlite3")
    with closing(sqlite3.connect(made.path)) as copy:
        assert copy.execute("SELECT count(*) FROM cf_routing_rule").fetchone() == (1,)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_is_asked_of_a_closed_ledger_is_answered(settings: Settings) -> None:
    with open_ledger(settings.database) as ledger:
        pass
    with pytest.raises(LedgerError, match="closed"):
        ledger.write(rules)
