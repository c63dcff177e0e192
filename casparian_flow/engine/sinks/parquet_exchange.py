"""A topic's folder of a Parquet sink is exchanged for another one, in one step.

Many files that move one by one show a reader of the folder a mixture. So the folder as it is to be
is built beside it, of hard links, and the two names are exchanged (`renameat2`, RENAME_EXCHANGE).
What the older folder still has is then taken out of it, and it is removed. Files of other programs
are linked as well, and what they wrote meanwhile is moved over.

Each step looks at the disk first. A process that is killed leaves the other folder behind, and
whoever settles next finishes with it (`_finish`), whether the folders were exchanged or not.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.parquet_record import KEPT, Entry, is_visible

FEW = 8
"""So many files move one by one, if their columns are the topic's."""

OTHERS = f"{durable.STATE_FOLDER}/exchange"
"""Where the other folder is, under the topic's name."""

COLUMNS = f"{durable.STATE_FOLDER}/columns"
"""Where the columns are, in a folder for each topic, that a topic gets with the next settlement."""


def settle(root: Path, entries: Sequence[Entry]) -> None:
    """Exchange the folders of the topics that change much; all else is left to the caller.

    Args:
        entries: whose files are to move.

    Raises:
        OSError: the disk refused.
    """
    for topic in dict.fromkeys(entry.topic for entry in entries):
        moving = [entry for entry in entries if entry.topic == topic]
        folder, other = root / topic, root / OTHERS / topic
        if os.path.lexists(other):  # another process was killed
            _finish(root, folder, other, moving)
        if _is_much(root, topic, moving) and _can(root, folder, moving):
            keep(root, [e for e in moving if is_visible(e.source) and e.suffix])
            _build(root, folder, other, moving)
            if not swap(other, folder):
                durable.remove(other)
                continue
            crashpoint("parquet.folders_exchanged")
            durable.fsync_path(root)
            durable.fsync_path(other.parent)
            crashpoint("parquet.exchange_synced")
            _finish(root, folder, other, moving)


def settle_columns(root: Path) -> None:
    """Give topics the columns that they are to have, where no exchange did."""
    for folder in (root / COLUMNS).glob("*/"):
        if (file := folder / parts.COLUMNS_FILE).exists():
            os.replace(file, root / folder.name / parts.COLUMNS_FILE)
            crashpoint("parquet.columns_replaced")
            durable.fsync_path(root / folder.name)
    forget_columns(root)


def forget_columns(root: Path) -> None:
    """Remove columns that topics are not to have any more."""
    if os.path.lexists(root / COLUMNS):
        durable.remove(root / COLUMNS)
        crashpoint("parquet.columns_forgotten")


def swap(path: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that cannot be done."""
    renameat2: Callable[..., int] | None = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = os.fsencode(path), os.fsencode(other)
    return bool(renameat2 and not renameat2(here, paths[0], here, paths[1], exchange))


def _is_much(root: Path, topic: str, moving: Sequence[Entry]) -> bool:
    """Whether a reader should see all of it at once: the columns change, or what was published
    changes in many files. A publication of new files is no exchange: it would link all others."""
    if (root / COLUMNS / topic / parts.COLUMNS_FILE).exists():
        return True
    seen = [e for e in moving if is_visible(e.source) or is_visible(e.path)]
    is_new = any(is_visible(e.path) and not e.source.startswith(KEPT) for e in seen)
    return len(seen) > FEW and not is_new


def _can(root: Path, folder: Path, moving: Sequence[Entry]) -> bool:
    """Whether the folder can be exchanged: everything is where the record says, there is nothing
    in it that a hard link cannot carry over, and nothing is known of the folder that a new one
    would not have."""
    look, state = os.lstat(folder), os.stat(root / durable.STATE_FOLDER)
    is_plain = stat.S_ISDIR(look.st_mode) and not os.path.ismount(folder)
    if not is_plain or look.st_dev != state.st_dev or look.st_uid != os.geteuid():
        return False
    if look.st_gid != os.getegid() or os.listxattr(folder):
        return False
    is_there = all(
        os.path.lexists(root / entry.source)
        for entry in moving
        if is_visible(entry.source) or is_visible(entry.path)
    )
    ours = {path.name for path in parts.list_outputs(folder)}
    with os.scandir(folder) as found:
        return is_there and all(
            each.is_file(follow_symlinks=False) or (each.name in ours and not each.is_symlink())
            for each in found
        )


def keep(root: Path, leaving: Sequence[Entry]) -> None:
    """Give visible files a second name among the kept ones, durably."""
    folders = set()
    for entry in leaving:
        name, kept = root / entry.source, root / entry.kept_path
        if not is_same(name, kept):
            durable.remove(kept)
            os.link(name, kept)
            crashpoint("parquet.kept")
        folders.add(kept.parent)
    for folder in folders:
        durable.fsync_path(folder)
        crashpoint("parquet.kept_synced")


def _build(root: Path, folder: Path, other: Path, moving: Sequence[Entry]) -> None:
    """Build the folder as it is to be."""
    durable.make_folder(other.parent, mode=0o700)
    other.mkdir()
    os.chmod(other, stat.S_IMODE(folder.stat().st_mode))
    columns = root / COLUMNS / folder.name / parts.COLUMNS_FILE
    leaving = {entry.source for entry in moving if is_visible(entry.source)}
    for each in folder.iterdir():
        is_replaced = each.name == parts.COLUMNS_FILE and columns.exists()
        if f"{folder.name}/{each.name}" not in leaving and not is_replaced:
            _link(each, other / each.name)
    for entry in moving:
        if is_visible(entry.path):
            _link(root / entry.source, root / OTHERS / entry.path)
    if columns.exists():
        os.link(columns, other / parts.COLUMNS_FILE)
    durable.fsync_path(other)
    crashpoint("parquet.exchange_built")


def _link(source: Path, target: Path) -> None:
    """Give a file, or each of an output's parts, a second name."""
    if not source.is_dir():
        os.link(source, target, follow_symlinks=False)
        return
    target.mkdir()
    for part in parts.files(source):
        os.link(part, target / part.name)
    durable.fsync_path(target)


def _finish(root: Path, folder: Path, other: Path, moving: Sequence[Entry]) -> None:
    """Take out of the other folder what is still needed, and remove it.

    The folders may not have been exchanged yet, or it may have been begun to remove the other one.
    """
    for entry in moving:
        path, kept = other / Path(entry.source).name, root / entry.kept_path
        if is_visible(entry.source) and parts.names(path, entry.output_key):
            take_out(path, kept)
    for entry in moving:
        is_shown = is_visible(entry.path) and parts.names(root / entry.path, entry.output_key)
        if is_shown and not is_visible(entry.source):
            durable.remove(root / entry.source)
            crashpoint("parquet.source_removed")
    known = {Path(path).name for entry in moving for path in (entry.source, entry.path)}
    known.add(parts.COLUMNS_FILE)
    for theirs in _theirs(other, known):
        name = folder / theirs.name
        is_lost = not os.path.lexists(name)
        if is_lost or (
            not is_same(theirs, name) and theirs.lstat().st_mtime_ns > name.lstat().st_mtime_ns
        ):
            os.replace(theirs, name)
            crashpoint("parquet.theirs_moved")
    durable.fsync_path(folder)
    durable.remove(other)
    crashpoint("parquet.other_removed")


def _theirs(other: Path, known: set[str]) -> Iterator[Path]:
    """What the other folder has besides outputs that move: other programs' files, and outputs that
    stay, of which the folder has the same file."""
    outputs = set(parts.list_outputs(other))
    for path in sorted(other.iterdir()):
        is_output = path in outputs and path.is_dir() and not path.is_symlink()
        if path.name not in known and not is_output:
            yield path


def take_out(path: Path, kept: Path) -> None:
    """Move an output to the kept ones, if it is still there."""
    if not os.path.lexists(path):
        return
    if is_same(path, kept):  # a rename does nothing if both are names of one file
        path.unlink()
    else:
        durable.remove(kept)
        path.rename(kept)
    crashpoint("parquet.moved")


def is_same(path: Path | str, other: Path | str) -> bool:
    """Whether two names are of one file."""
    try:
        return os.path.samestat(os.lstat(path), os.lstat(other))
    except FileNotFoundError:
        return False
