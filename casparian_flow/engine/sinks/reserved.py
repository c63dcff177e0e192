"""Places that are no sink's: the ledger and its side files, the configuration, keys and caches.

SQLite names its side files after the database (`-wal`, `-shm`, `-journal`), takes whatever is there
for its own, and deletes it. So no sink may have such a name, nor a folder on the way to it.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from casparian_flow import config
from casparian_flow.atomic import STATE_FOLDER
from casparian_flow.config import Settings
from casparian_flow.engine import sinks
from casparian_flow.errors import ConfigError

SIDE_FILES = ("-wal", "-shm", "-journal")
_MAGIC = b"SQLite format 3\0"
_NO_FILES = ("/proc/", "/sys/", "/dev/")
"""What is below these is no file that stays: `/proc/self/fd/5` is another thing in each process,
and may be the ledger in the daemon's."""
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  a folder of files like any other, until a restart
_ELSEWHERE = "give the topic a place of its own"


def check(location: str, topic: str, settings: Settings) -> None:
    """Return if a topic may go to a sink, whatever links and spellings lead there.

    Raises:
        ConfigError: it would be in the place of something of ours, or of a side file of SQLite.
    """
    target = sinks.target(location, topic)
    if target is None:
        return
    sinks.check_not_ledger(location, settings.database.path)
    is_file = location.startswith(sinks.PREFIXES["sqlite"])
    for fault in _faults(str(target), is_file, settings):
        raise ConfigError(f"topic {topic!r} cannot go to {target}: {fault}", _ELSEWHERE)


def check_content(location: str, topic: str) -> None:
    """Return if what is in a sink's place, if anything is, can be a sink.

    Raises:
        ConfigError: it is another file.
    """
    target = sinks.target(location, topic)
    if target is None:
        return
    is_file = location.startswith(sinks.PREFIXES["sqlite"])
    for path in (target.parent if is_file else target, *target.parents):
        if os.path.exists(path) and not os.path.isdir(path):  # False where we may not look
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
        return  # it is not there, or the sink itself says what is wrong
    raise ConfigError(
        f"topic {topic!r} cannot go to {target}: that is something else, and no SQLite database",
        _ELSEWHERE,
    )


def _faults(target: str, is_file: bool, settings: Settings) -> Iterator[str]:
    """What is wrong with a place, by each name that it has."""
    for path in _names(target):
        if fault := _fault_of_name(path, is_file, settings.database.path, settings.home):
            yield fault
        for side in _side_files_on(path):
            if os.path.isfile(side[: side.rindex("-")]):
                yield f"{side} is a side file of the database {side[: side.rindex('-')]}"
        if is_file:
            yield from (f"{path}{s} is a folder" for s in SIDE_FILES if os.path.isdir(path + s))


def _names(path: str) -> Iterator[str]:
    """The name as it is, and what links make of it: that is not asked where the name is at fault,
    for links of /proc may be another user's."""
    yield path
    if (real := os.path.realpath(path)) != path:
        yield real


@functools.lru_cache(1024)
def _fault_of_name(path: str, is_file: bool, database: Path, home: Path) -> str:
    """What can be said without looking at the disk; empty where nothing is wrong."""
    if path.startswith(_NO_FILES) and not path.startswith(_SHARED_MEMORY):
        return f"what is below {path[: path.index('/', 1)]} are no files that stay"
    ours = _ours(database, home)
    if is_file and path.casefold().endswith(SIDE_FILES):
        return f"SQLite takes a file whose name ends in {', '.join(SIDE_FILES)} for its own"
    if os.path.basename(path).casefold() == config.FILE_NAME:
        return f"a file of the name {config.FILE_NAME} is a configuration"
    if STATE_FOLDER in path.casefold().split(os.sep):
        return f"a folder {STATE_FOLDER} is for our own state"
    for each in (path, *map(str, Path(path).parents)):
        if what := ours.get(each.casefold()):
            return f"{each} is {what}"
    for inner, what in ours.items():
        if not is_file and inner.startswith(path.casefold().rstrip("/") + "/"):
            return f"{what} is in it"
    return ""


@functools.lru_cache(1024)
def _side_files_on(path: str) -> list[str]:
    """The names on the way to a path that are those of side files, if there is a database."""
    way = (path, *map(str, Path(path).parents))
    return [each for each in way if each.casefold().endswith(SIDE_FILES)]


@functools.lru_cache(64)
def _ours(database: Path, home: Path) -> dict[str, str]:
    """Path in small letters -> what of ours is there."""
    named = config.named()
    found = {
        database: "the ledger",
        **{Path(f"{database}{suffix}"): "a side file of the ledger" for suffix in SIDE_FILES},
        home / config.FILE_NAME: "the configuration",
        **({named: "the configuration"} if named else {}),
        config.keys_folder(): "where the keys are",
        config.cache_folder(): "a cache, which may be deleted at any time",
        config.runtime_folder(): "the folder of sockets",
    }
    return {
        name.casefold(): what
        for path, what in found.items()
        for name in (os.path.abspath(path), os.path.realpath(path))
    }
