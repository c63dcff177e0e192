"""Sinks: the places that topics are written to. A URI names each.

    parquet://path/to/output            a folder: each topic is a folder in it, each output a file
    sqlite:///path/to/db.sqlite3        a database: each topic is a table in it
    mssql://table, mssql://schema.table a table of the SQL Server in the configuration

The path is relative to the configuration's folder; one more slash makes it absolute
(`parquet:///abs`, `sqlite:////abs`). pyarrow is imported only when a sink is opened.
`Sink` is the contract; tests/sinks/test_contract.py checks every sink against it.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from casparian_flow import config, sink_uri
from casparian_flow.config import Settings
from casparian_flow.durable import STATE_FOLDER
from casparian_flow.errors import ConfigError, JobError
from casparian_flow.protocol import Output, Publication

if TYPE_CHECKING:
    from casparian_flow.config import DatabaseSettings
    from casparian_flow.engine.sinks.stage import Stage


PREFIXES = {"parquet": "parquet://", "sqlite": "sqlite:///"}
"""Scheme -> the part of a URI before the path."""

SERVER = "mssql://"
"""The part of a URI before the name of a SQL Server table."""

_ACCEPTED = "write parquet://path/to/output, sqlite:///path/to/db.sqlite3 or mssql://table"

_PART = r"(?:\[((?:[^\]]|\]\])+)\]|([^.\[\]]+))"
_TABLE = re.compile(rf"(?:{_PART}\.)?{_PART}")
_NAME_LIMIT = 128


class Sink(Protocol):
    """A place that topics are written to.

    The ledger decides what readers see of each output (`protocol.State`); a sink is told, keeps the
    rows of outputs that are not visible, and records every output with its facts and state.
    """

    stage_folder: Path
    """The folder for staged outputs: on the target's filesystem, inside a `.casparian` folder."""

    def open_stage(self, output: Output, attempt: str) -> Stage:
        """Start an output.

        Args:
            output: as it was claimed.
            attempt: the attempt's unique name; the staged file's name begins with it.

        Raises:
            OutputRefused: this sink does not support the topic's name or mode.
            SinkUnavailable: the folder cannot be created or written.
        """

    def publish(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """Make each job's sealed outputs durable in the given states, and change the states of the
        outputs that they take the place of, in one step where the sink can; idempotent.

        An output whose key is already recorded is adopted: its rows are not written again, and it
        gets the given state. The staged file of a published output is removed. All outputs of one
        job are published with its changes, or nothing is. A job that fails changes nothing and
        does not stop the others.

        Mode `error`: SinkConflict if the target holds rows or files of other programs.

        Returns:
            for each job its outputs as they are now, with target, rows, digest and times; or why
            they were not published: a SinkConflict (another program's data is in the target),
            OutputRefused (this sink cannot hold the rows), SinkUnavailable (full, locked,
            read-only, or to be upgraded first), or a plain JobError (the staged file is gone or
            damaged).
        """

    def change(self, outputs: Sequence[Output]) -> None:
        """Give outputs the state and mode that they have here: all in one step where the sink can;
        idempotent. Outputs that the sink does not record are passed over.

        Raises:
            SinkConflict: an output that is to be visible is gone or was altered; nothing was
                changed.
            SinkUnavailable: full, locked, read-only, or to be upgraded first.
        """

    def check(self, outputs: Sequence[Output]) -> list[str]:
        """Compare what the ledger says with the sink's content: record, state, rows and bytes; one
        sentence for each output that differs."""

    def records(self, known: Collection[str]) -> Iterator[Output]:
        """List outputs that the ledger does not know, and all retracted ones.

        An output that cannot be read is left out; publishing to its name reports the fault.

        Args:
            known: the output keys that the ledger has.

        Raises:
            SinkUnavailable: the sink exists and cannot be read.
        """

    def delete(self, outputs: Sequence[Output]) -> None:
        """Delete outputs and their record, so that they can be published again; idempotent.

        Raises:
            SinkConflict: an altered file has the name of one, and a person must move it away.
            SinkUnavailable: full, locked, read-only, or to be upgraded first.
        """

    def upgrade(self) -> list[str]:
        """Bring what an earlier release wrote up to date; idempotent, and safe to kill at any step.
        Readers see the same rows before and after.

        Returns:
            a sentence for each topic that was changed.

        Raises:
            SinkConflict: the sink was altered, so that its outputs cannot be told apart.
            SinkUnavailable: full, locked, read-only.
        """


def resolve(uri: str, home: Path) -> str:
    """Return the sink's location: the URI without options and with an absolute path.

    The URI of a SQL Server table stays as it is.

    Args:
        uri: from the configuration, or from a MANIFEST after its variables are expanded.
        home: the folder that relative paths start at; absolute.

    Raises:
        ConfigError: the scheme or an option is unknown, or the path is missing or reserved.
    """
    uri = sink_uri.read(uri).uri
    scheme = uri.partition("://")[0]
    if uri.startswith(SERVER):
        table_of(uri)
        return uri
    prefix = PREFIXES.get(scheme)
    if prefix is None:
        raise ConfigError(
            f"sink scheme {scheme!r} is not supported; supported: {', '.join(PREFIXES)}, mssql",
            _ACCEPTED,
        )
    path = uri.removeprefix(prefix)
    if path == uri or not path.strip("/"):
        raise ConfigError(f"sink {uri!r} has no path", _ACCEPTED)
    if "\0" in path:
        raise ConfigError(f"sink {uri!r} has a NUL character", _ACCEPTED)
    if "${" in path:
        raise ConfigError(
            f"sink {uri!r} contains a variable; variables are expanded only in a MANIFEST and "
            "by `casparian topics set`",
            "write the path itself",
        )
    path = os.path.abspath(home / path)
    if STATE_FOLDER in path.split(os.sep):
        raise ConfigError(
            f"sink {uri!r} is in a folder {STATE_FOLDER}, which is reserved for Casparian "
            "Flow's state",
            "choose another folder",
        )
    return prefix + path


def target_of(location: str, topic: str) -> Path | None:
    """The folder or database that holds a topic's rows; None for a table of SQL Server."""
    if location.startswith(SERVER):
        return None
    is_folder = location.startswith(PREFIXES["parquet"])
    return path_of(location) / topic if is_folder else path_of(location)


def path_of(location: str) -> Path:
    """The folder of a Parquet sink, or the database of a SQLite sink."""
    return Path(location.removeprefix(PREFIXES[location.partition("://")[0]]))


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return path == other


def table_of(uri: str) -> tuple[str, str]:
    """Schema and table of an `mssql://` URI. An empty schema means the login's default schema.

    A name may be in brackets, as in T-SQL: `mssql://[my.schema].[a ]] table]`.

    Raises:
        ConfigError: the URI names no table, or one that Casparian Flow cannot use.
    """
    found = _TABLE.fullmatch(uri.removeprefix(SERVER))
    if not found:
        raise ConfigError(
            f"sink {uri!r} does not name a table", "write mssql://table or mssql://schema.table"
        )
    bracketed_schema, schema, bracketed_table, table = found.groups("")
    names = tuple((b.replace("]]", "]") or p) for b, p in
                  ((bracketed_schema, schema), (bracketed_table, table)))  # fmt: skip
    for name in filter(None, names):
        fault = (
            "has unprintable characters" if not name.isprintable()
            else f"is longer than {_NAME_LIMIT} characters" if _units(name) > _NAME_LIMIT
            else "names a temporary table" if name.startswith("#")
            else "is a reserved name" if name.lower().startswith(("_cf_", "casparian_stage_"))
            else ""
        )  # fmt: skip
        if fault:
            raise ConfigError(
                f"sink {uri!r}: the name {name[:40]!r} {fault}", "choose another name"
            )
    return names[0], names[1]


def _units(name: str) -> int:
    return len(name.encode("utf-16-le")) // 2


def open_sink(location: str, database: DatabaseSettings) -> Sink:
    """The sink at a location that `resolve` returned. Opens no file and no connection.

    Args:
        database: settings of the ledger's database. Outputs for SQL Server are staged beside the
            ledger, and its `mssql` settings say how the server is reached (a Worker needs none).
    """
    if location.startswith(SERVER):
        from casparian_flow.engine.sinks.mssql import MssqlSink

        return MssqlSink(location, database)
    if location.startswith(PREFIXES["parquet"]):
        from casparian_flow.engine.sinks.parquet import ParquetSink

        return ParquetSink(path_of(location))
    from casparian_flow.engine.sinks.sqlite import SqliteSink

    return SqliteSink(path_of(location))


def records(location: str, database: DatabaseSettings, known: Collection[str]) -> Iterable[Output]:
    """What `Sink.records` of the sink lists, as it is asked at each start and scan.

    The record of a Parquet sink is read without pyarrow, which takes half a second to import.

    Raises:
        SinkUnavailable: the sink exists and cannot be read.
    """
    if location.startswith(PREFIXES["parquet"]):
        from casparian_flow.engine.sinks import parquet_record

        listed = parquet_record.listed(path_of(location), known)
        if listed is not None:
            return listed
    return open_sink(location, database).records(known)


def store(location: str) -> str:
    """The part of a location that one transaction covers: the whole SQL Server, else the sink.

    The outputs of one job in one store become visible together, and a store is paused as a whole.
    """
    return SERVER if location.startswith(SERVER) else location


def check_usable(location: str, database: DatabaseSettings) -> None:
    """Check that a sink's settings and driver are present.

    Raises:
        ConfigError: the sink is a table of SQL Server, and no server is configured or the driver
            is not installed.
    """
    if location.startswith(SERVER):
        from casparian_flow.engine.sinks.mssql_session import check_configured

        check_configured(database.mssql)


def drop_stages(location: str, database: DatabaseSettings, tag: str, owed: Collection[str]) -> None:
    """Drop a ledger's stage tables that no pending output needs. Only SQL Server has any.

    Args:
        tag: the ledger's tag, which begins the names of its staged files.
        owed: staged files that are still to be published.

    Raises:
        SinkUnavailable: the server cannot be reached, or refuses.
    """
    if location.startswith(SERVER):
        from casparian_flow.engine.sinks.mssql import MssqlSink

        MssqlSink(location, database).drop_stages(tag, owed)


def seal(stages: Sequence[Stage]) -> list[Output]:
    """Make staged outputs durable; see `stage.seal`."""
    from casparian_flow.engine.sinks import stage

    return stage.seal(stages)


# Reserved paths: the ledger, the configuration, keys, caches, and SQLite's side files.
#
# SQLite treats any file named like a side file of a database as its own, and deletes it. So
# neither a sink nor a folder above it may have such a name.

SIDE_FILES = ("-wal", "-shm", "-journal")
_MAGIC = b"SQLite format 3\0"
_NO_FILES = ("/proc/", "/sys/", "/dev/")
"""Folders without lasting files: `/proc/self/fd/5` differs from process to process, and may be the
ledger in the daemon."""
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  ordinary files, until the machine restarts
_ELSEWHERE = "give the topic a place of its own"


def check_reserved(location: str, topic: str, settings: Settings) -> None:
    """Check that a topic's target is not a reserved path, also after links are resolved.

    Raises:
        ConfigError: it is a path of Casparian Flow's own, or of a side file of SQLite.
    """
    target = target_of(location, topic)
    if target is None:
        return
    is_file = location.startswith(PREFIXES["sqlite"])
    for fault in _faults(str(target), is_file, settings):
        raise ConfigError(f"topic {topic!r} cannot go to {target}: {fault}", _ELSEWHERE)


def check_reserved_content(location: str, topic: str) -> None:
    """Check that a topic's target is absent, or is a folder or database as its sink needs it.

    Raises:
        ConfigError: another kind of file is there.
    """
    target = target_of(location, topic)
    if target is None:
        return
    is_file = location.startswith(PREFIXES["sqlite"])
    for path in (target.parent if is_file else target, *target.parents):
        if os.path.exists(path) and not os.path.isdir(path):  # False without permission to look
            raise ConfigError(
                f"topic {topic!r} cannot go to {target}: {path} is a file", _ELSEWHERE
            )
    try:
        look = os.stat(target)
        if not is_file:
            return
        if stat.S_ISREG(look.st_mode):
            if not look.st_size:
                return
            with target.open("rb") as file:
                if file.read(len(_MAGIC)) == _MAGIC:
                    return
    except OSError:
        return  # it is absent, or opening the sink will report the error
    raise ConfigError(
        f"topic {topic!r} cannot go to {target}: it exists and is not a SQLite database",
        _ELSEWHERE,
    )


def _faults(target: str, is_file: bool, settings: Settings) -> Iterator[str]:
    """What is wrong with a target, by its own path and its real path."""
    if is_file and _is_same(Path(target), settings.database.path):
        yield "it is the ledger itself"
    for path in _names(target):
        if fault := _fault_of_name(path, is_file, settings.database.path, settings.home):
            yield fault
        for side in _side_files_on(path):
            if os.path.isfile(side[: side.rindex("-")]):
                yield f"{side} is a side file of the database {side[: side.rindex('-')]}"
        if is_file:
            yield from (f"{path}{s} is a folder" for s in SIDE_FILES if os.path.isdir(path + s))


def _names(path: str) -> Iterator[str]:
    # Lazy: after a fault in the first path no link is followed, since /proc may hold other users'.
    yield path
    if (real := os.path.realpath(path)) != path:
        yield real


@functools.lru_cache(1024)
def _fault_of_name(path: str, is_file: bool, database: Path, home: Path) -> str:
    """The faults that the path alone shows, without a look at the disk; empty if there is none."""
    if path.startswith(_NO_FILES) and not path.startswith(_SHARED_MEMORY):
        return f"{path[: path.index('/', 1)]} does not keep files"
    ours = _ours(database, home)
    if is_file and path.casefold().endswith(SIDE_FILES):
        return f"SQLite uses file names that end in {', '.join(SIDE_FILES)} itself"
    if os.path.basename(path).casefold() == config.FILE_NAME:
        return f"a file named {config.FILE_NAME} is a configuration"
    if STATE_FOLDER in path.casefold().split(os.sep):
        return f"a folder {STATE_FOLDER} is reserved for Casparian Flow's state"
    for folder in (path, *map(str, Path(path).parents)):
        if what := ours.get(folder.casefold()):
            return f"{folder} is {what}"
    for inner, what in ours.items():
        if not is_file and inner.startswith(path.casefold().rstrip("/") + "/"):
            return f"it contains {what}"
    return ""


@functools.lru_cache(1024)
def _side_files_on(path: str) -> list[str]:
    """The path and the folders above it that are named like side files of SQLite."""
    paths = (path, *map(str, Path(path).parents))
    return [name for name in paths if name.casefold().endswith(SIDE_FILES)]


@functools.lru_cache(64)
def _ours(database: Path, home: Path) -> dict[str, str]:
    """Case-folded path -> what Casparian Flow keeps there."""
    named = config.named()
    found = {
        database: "the ledger",
        **{Path(f"{database}{suffix}"): "a side file of the ledger" for suffix in SIDE_FILES},
        home / config.FILE_NAME: "the configuration",
        **({named: "the configuration"} if named else {}),
        config.keys_folder(): "the folder of keys",
        config.cache_folder(): "a cache, which may be deleted at any time",
        config.runtime_folder(): "the folder of sockets",
    }
    return {
        name.casefold(): what
        for path, what in found.items()
        for name in (os.path.abspath(path), os.path.realpath(path))
    }
