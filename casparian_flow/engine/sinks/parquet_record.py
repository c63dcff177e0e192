"""The record of a Parquet sink: a database that names every output, also those that show nothing.

    <root>/<topic>/<name>[.parquet]                              a visible output
    <root>/.casparian/kept/<topic>/<output key>[.parquet]        any other one
    <root>/.casparian/outputs.sqlite3                            the record

Before files move, one transaction records where each of them is to be and where it is now, its
`source`. When they have moved, another one empties `source`. So whoever opens the record after a
crash knows what is left to do (`parquet_moves.settle`). The journal is a rollback journal, which
commits durably and leaves no file beside the outputs. This module needs no pyarrow.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from casparian_flow.durable import STATE_FOLDER
from casparian_flow.engine.sinks.base import KEY_DIGITS, facts_in, output_of
from casparian_flow.errors import SinkUnavailable
from casparian_flow.protocol import Output, State

STAGE, KEPT = f"{STATE_FOLDER}/stage", f"{STATE_FOLDER}/kept"
BUSY_SECONDS = 30.0
"""How long to wait for a reader of the record; writers wait for the sink's lock instead."""


class Entry(msgspec.Struct, frozen=True):
    """What the record has of an output. Paths are relative to the sink's folder."""

    output_key: str
    topic: str
    mode: str
    state: str
    rows: int
    digest: str
    path: str
    """Where its file or folder is, or is to be; empty if it has none."""
    source: str
    """Where it is, until it has moved; then empty. With an empty path: it is to be deleted."""
    was: str
    """Until it has moved: state and mode of a visible output that another is to replace."""
    shown_at: str
    hidden_at: str
    facts: str
    """`base.facts_in` as JSON."""

    @property
    def disk(self) -> str:
        """Where its file or folder is on disk now."""
        return self.source or self.path

    @property
    def suffix(self) -> str:
        """`.parquet` for a file; empty for a folder of parts."""
        is_file = self.disk.removesuffix(".fitted").endswith((".parquet", ".part"))
        return ".parquet" if is_file else ""

    @property
    def stands(self) -> bool:
        """Whether readers see it, or ask for it as a past version."""
        return self.state in (State.CURRENT, State.PAST)

    @property
    def generation(self) -> int:
        """How often its job has been rebuilt."""
        return int(self._facts.get("generation", 0))

    @property
    def job_id(self) -> int:
        """The job that gave it."""
        return int(self._facts["job_id"])

    @property
    def _facts(self) -> dict[str, str]:
        return msgspec.json.decode(self.facts, type=dict[str, str])

    @property
    def kept_path(self) -> str:
        """Where it is while it is not visible."""
        return f"{KEPT}/{self.topic}/{self.output_key[:KEY_DIGITS]}{self.suffix}"

    def moved(self, path: str) -> Entry:
        """The same entry, to be moved to another path."""
        source = "" if path == self.disk else self.disk
        return msgspec.structs.replace(self, path=path, source=source)

    def settled(self) -> Entry:
        """The same entry after the move."""
        return msgspec.structs.replace(self, source="", was="")

    def stays(self) -> Entry:
        """The same entry as it was before the move."""
        state, mode = self.was.split()
        return msgspec.structs.replace(
            self, path=self.source, source="", was="", state=state, mode=mode, hidden_at=""
        )

    def told(self, output: Output) -> Entry:
        """The same entry with the output's state and mode, and the times that follow from them."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        shown_at, hidden_at = self.shown_at, self.hidden_at
        if output.visible:
            shown_at, hidden_at = shown_at or now, ""
        elif shown_at:
            hidden_at = hidden_at or now
        return msgspec.structs.replace(
            self, state=output.state.value, mode=output.mode, shown_at=shown_at, hidden_at=hidden_at
        )

    def output(self, root: Path) -> Output:
        """The output that it describes.

        Raises:
            ValueError, KeyError: its facts are not those of an output.
        """
        facts = msgspec.json.decode(self.facts, type=dict[str, str])
        return output_of(
            f"parquet://{root}", {**facts, "mode": self.mode}, rows=self.rows, digest=self.digest,
            state=State(self.state), target=str(root / (self.path or self.topic)),
            shown_at=self.shown_at, hidden_at=self.hidden_at,
        )  # fmt: skip


def entry_of(output: Output, source: str, digest: str) -> Entry:
    """The entry of an output that is new here; it has no place yet."""
    facts = msgspec.json.encode(facts_in(output)).decode()
    return Entry(
        output.output_key, output.topic, output.mode, State.HIDDEN.value, output.rows, digest, "",
        source, "", "", "", facts,
    )  # fmt: skip


def is_visible(path: str) -> bool:
    """Whether an output at this path is visible to readers."""
    return bool(path) and not path.startswith(f"{STATE_FOLDER}/")


_COLUMNS = ", ".join(Entry.__struct_fields__)
_CHANGING = Entry.__struct_fields__[1:]
_TABLE = """
CREATE TABLE IF NOT EXISTS outputs (
    id INTEGER PRIMARY KEY,
    output_key TEXT NOT NULL UNIQUE,
    topic TEXT NOT NULL,
    mode TEXT NOT NULL,
    state TEXT NOT NULL,
    rows INTEGER NOT NULL,
    digest TEXT NOT NULL,
    path TEXT NOT NULL,
    source TEXT NOT NULL,
    was TEXT NOT NULL,
    shown_at TEXT NOT NULL,
    hidden_at TEXT NOT NULL,
    facts TEXT NOT NULL
)
"""
_MOVING = "CREATE INDEX IF NOT EXISTS outputs_moving ON outputs (source) WHERE source <> ''"
_PUT = f"""
INSERT INTO outputs ({_COLUMNS}) VALUES ({", ".join("?" * len(Entry.__struct_fields__))})
ON CONFLICT (output_key) DO UPDATE SET {", ".join(f"{c} = excluded.{c}" for c in _CHANGING)}
"""  # noqa: S608  the names are those above
_SELECT = f"SELECT {_COLUMNS} FROM outputs"  # noqa: S608


class Record:
    """The record of one sink, opened. Whoever writes holds the sink's lock."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.exists = bool(connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone())
        """Whether anything was ever recorded; False for a sink of an earlier release."""

    def entries(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries of these output keys, by key."""
        wanted = msgspec.json.encode(list(keys)).decode()
        where = "WHERE output_key IN (SELECT value FROM json_each(?))"
        return {entry.output_key: entry for entry in self._select(where, wanted)}

    def places(self, topic: str) -> dict[str, tuple[str, str]]:
        """Output key -> path and source of each output of a topic that has a file."""
        query = "SELECT output_key, path, source FROM outputs WHERE topic = ? AND path <> ''"
        rows = self._connection.execute(query, [topic]) if self.exists else ()
        return {key: (path, source) for key, path, source in rows}

    def key_at(self, path: str) -> str:
        """The key of the output that has this path in the sink; empty if none has."""
        query = "SELECT output_key FROM outputs WHERE path = ?"
        row = self._connection.execute(query, [path]).fetchone()
        return str(row[0]) if row else ""

    def of_topic(self, topic: str) -> dict[str, Entry]:
        """The entries of a topic, by key."""
        query = "WHERE topic = ? ORDER BY id"
        return {entry.output_key: entry for entry in self._select(query, topic)}

    def is_rebuilding(self, topic: str) -> bool:
        """Whether it has rebuilt outputs that nobody has seen yet."""
        where = "WHERE topic = ? AND shown_at = '' AND path <> '' AND state = 'hidden'"
        return any(entry.generation for entry in self._select(where, topic))

    def moving(self) -> list[Entry]:
        """The entries whose files are still to move."""
        # The sign keeps SQLite from reading every entry in the order of their ids.
        return list(self._select("WHERE source <> '' ORDER BY +id"))

    def all(self) -> Iterator[Entry]:
        """Every entry, in the order of their arrival."""
        return self._select("ORDER BY id")

    def put(self, entries: Iterable[Entry], removed: Iterable[str] = ()) -> None:
        """Add or change entries, and remove others, in one durable transaction."""
        with self._transaction() as connection:
            connection.execute(_TABLE)
            connection.execute(_MOVING)
            connection.executemany(_PUT, map(msgspec.structs.astuple, entries))
            self._remove(removed)
        self.exists = True

    def settled(self, removed: Iterable[str], staying: Iterable[Entry]) -> None:
        """Say that all files have moved, but for those that stay; remove the entries of others."""
        with self._transaction() as connection:
            self._remove(removed)
            connection.executemany(_PUT, map(msgspec.structs.astuple, staying))
            connection.execute("UPDATE outputs SET source = '', was = '' WHERE source <> ''")

    def _remove(self, keys: Iterable[str]) -> None:
        statement = "DELETE FROM outputs WHERE output_key = ?"
        self._connection.executemany(statement, [(key,) for key in keys])

    def _select(self, where: str, *values: str) -> Iterator[Entry]:
        if self.exists:
            for row in self._connection.execute(f"{_SELECT} {where}", values):
                yield Entry(*row)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def path_of(root: Path) -> Path:
    """The path of a sink's record."""
    return root / STATE_FOLDER / "outputs.sqlite3"


@contextlib.contextmanager
def opened(root: Path, *, write: bool) -> Iterator[Record | None]:
    """Open a sink's record; None if there is none and it is only to be read.

    Raises:
        SinkUnavailable: it cannot be read or written.
    """
    path = path_of(root)
    if not write and not path.exists():
        yield None
        return
    # A reader, too, undoes a transaction that was killed.
    uri = f"{path.as_uri()}?mode={'rwc' if write else 'rw'}"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        with contextlib.closing(connection):
            if write:  # a journal that is kept makes a commit durable without syncing the folder
                connection.execute("PRAGMA journal_mode = PERSIST")
                connection.execute("PRAGMA synchronous = FULL")
            record = Record(connection)
            yield record if write or record.exists else None
    except sqlite3.Error as error:
        raise _unavailable(error, path) from error


def listed(root: Path, known: Collection[str]) -> list[Output] | None:
    """What `Sink.records` lists, of a sink that is not there, or has a record and nothing left to
    move; else None.

    Raises:
        SinkUnavailable: the record cannot be read.
    """
    with opened(root, write=False) as record:
        if record and not record.moving():
            return outputs(root, record.all(), known)
    try:
        root.lstat()
    except FileNotFoundError:
        return []
    return None


def outputs(root: Path, entries: Iterable[Entry], known: Collection[str]) -> list[Output]:
    """The outputs that the ledger does not know, and all retracted ones; without those whose facts
    cannot be read."""
    found = []
    for entry in entries:
        if entry.state == State.RETRACTED or entry.output_key not in known:
            with contextlib.suppress(ValueError, KeyError):
                found.append(entry.output(root))
    return found


def _unavailable(error: sqlite3.Error, path: Path) -> SinkUnavailable:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        hint = f"move {path}* elsewhere, then build it anew from the files: casparian upgrade"
    elif code == sqlite3.SQLITE_FULL:
        hint = "free some space; the jobs then continue by themselves"
    else:
        hint = "casparian verify   (when the disk is well again)"
    return SinkUnavailable(f"cannot use the sink's record {path}: {error}", hint)
