"""Files of a Parquet sink as they move, and a sink without a record as its footers describe it.

A reader of a topic's folder sees whole outputs only. A new one appears by `link`, which refuses an
existing name, or if it is a folder of parts by `rename`. An output that takes the place of another
gets its name: the older file is linked to the kept ones first, then the newer one is renamed onto
it, so a reader sees one of them at any time. Two folders are exchanged by `renameat2`. Where the
filesystem has no exchange, or where a folder takes the place of a file, the older one goes first,
and a reader may see neither for an instant.

Many files that move one by one show a mixture. So if much changes, or if the columns do, the
topic's folder as it is to be is built beside it first, of hard links, and the two folders are
exchanged. What is below then finds it done.

Each step looks at the disk first, so what a killed process has left is finished by whoever settles
next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import KEY_DIGITS, output_of
from casparian_flow.engine.sinks.parquet_record import (
    KEPT,
    STAGE,
    Entry,
    Record,
    entry_of,
    is_visible,
)
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State

HIDDEN = f"{durable.STATE_FOLDER}/hidden"
"""Where earlier releases kept retracted outputs, in a folder for each topic."""

FEW = 8
"""So many files move one by one, if their columns are the topic's."""

OTHERS = f"{durable.STATE_FOLDER}/exchange"
"""Where the other folder is, under the topic's name."""

COLUMNS = f"{durable.STATE_FOLDER}/columns"
"""Where the columns are, in a folder for each topic, that a topic gets with the next settlement."""


def settle(root: Path, record: Record) -> list[str]:
    """Move files to where the record says, and mark it done; the caller holds the sink's lock.

    Each step looks at the disk first, so a settlement that was killed is repeated as a whole.

    Returns:
        keys of outputs that were to be published and whose staged files are gone; their entries
        are removed.

    Raises:
        SinkUnavailable: another program's file is in the way.
        OSError: the disk refused.
    """
    entries = record.moving()
    if not entries:
        _forget_columns(root)
        return []
    leaving = {entry.source: entry for entry in entries if is_visible(entry.source)}
    arriving = [entry for entry in entries if is_visible(entry.path)]
    kept = {root / KEPT / entry.topic for entry in entries if not is_visible(entry.path)}
    for folder in kept:
        durable.make_folder(folder, mode=0o700)
    for topic in {entry.topic for entry in arriving}:
        durable.make_folder(root / topic)
    _exchange_folders(root, entries)
    _settle_columns(root)
    replaced = [leaving.pop(entry.path, None) for entry in arriving]
    # The rename consumes the newer file: while it is there, the older one has its name.
    pairs = [(entry, older) for entry, older in zip(arriving, replaced, strict=True) if older]
    both = [
        older
        for entry, older in pairs
        if all(os.path.isfile(root / e.source) for e in (entry, older))
    ]
    _name_twice(root, both)
    for entry in leaving.values():
        _take_out(root / entry.source, root / entry.kept_path)
    gone, staying = [], []
    for entry, older in zip(arriving, replaced, strict=True):
        if not _show(root, entry, older):
            gone.append(entry.output_key)
            staying += [older.stays()] if older and older.was else []
    for entry in entries:
        if (
            not is_visible(entry.source)
            and not is_visible(entry.path)
            and not _put_away(root, entry)
        ):
            gone.append(entry.output_key)
    for folder in kept | {root / entry.topic for entry in [*arriving, *leaving.values()]}:
        durable.fsync_path(folder)
        crashpoint("parquet.synced")
    deleted = [entry for entry in entries if not entry.path]
    for entry in deleted:
        durable.remove(root / entry.kept_path)
        crashpoint("parquet.deleted")
    record.settled([*gone, *(entry.output_key for entry in deleted)], staying)
    crashpoint("parquet.settled")
    return gone


def _show(root: Path, entry: Entry, older: Entry | None) -> bool:
    """Give an output its name in the topic's folder; False if its staged file is gone."""
    if older and not entry.suffix:
        return _exchange(root, entry, older)
    source, target = f"{root}/{entry.source}", f"{root}/{entry.path}"
    if not os.path.lexists(source):
        return _was_shown(root, entry, older)
    if older and os.path.lexists(target):
        os.replace(source, target)
        crashpoint("parquet.replaced")
        return True
    if entry.suffix:
        try:
            os.link(source, target)
        except FileExistsError:
            if not _is_same(source, target):
                raise _in_the_way(target) from None
        crashpoint("parquet.linked")
        if not entry.source.startswith(STAGE):
            os.unlink(source)
            crashpoint("parquet.unkept")
        return True
    if os.path.lexists(target):
        raise _in_the_way(target)
    os.rename(source, target)
    crashpoint("parquet.renamed")
    return True


def _exchange(root: Path, entry: Entry, older: Entry) -> bool:
    """Let a folder of parts take the name of another one; see `_show`."""
    target, kept = root / entry.path, root / entry.kept_path
    if entry.source != entry.kept_path:  # a stage may be swept while the older parts are in it
        _take_out(root / entry.source, kept)
    if not parts.names(target, entry.output_key):
        if not os.path.lexists(kept):
            return _was_shown(root, entry, older)
        if not swap(kept, target):
            _take_out(target, root / older.kept_path)
            kept.rename(target)
            crashpoint("parquet.renamed_in_turn")
            return True
        crashpoint("parquet.exchanged")
    _take_out(kept, root / older.kept_path)
    return True


def _was_shown(root: Path, entry: Entry, older: Entry | None) -> bool:
    """Whether an output whose source is gone has its name, or was published once.

    Else the output that it was to replace stays.
    """
    if parts.names(root / entry.path, entry.output_key):
        return True
    if entry.source.startswith(STAGE):
        if older and _is_same(root / older.source, root / older.kept_path):
            (root / older.kept_path).unlink()
        return False
    if older:
        _take_out(root / older.source, root / older.kept_path)
    return True


def _put_away(root: Path, entry: Entry) -> bool:
    """Move an output that was not visible to the kept ones; False as `_show`."""
    kept = root / entry.kept_path
    if entry.source != entry.kept_path:
        _take_out(root / entry.source, kept)
    return os.path.lexists(kept) or not entry.source.startswith(STAGE)


def _in_the_way(path: str) -> SinkUnavailable:
    return SinkUnavailable(
        f"cannot write {path}: another program has created it",
        "move it elsewhere, and let only casparian write to that folder; the job then continues by "
        "itself",
    )


# A topic's folder is exchanged for another one. Files of other programs are linked as well, and
# what they wrote meanwhile is moved over. A process that is killed leaves the other folder behind,
# and `_finish` finishes with it, whether the folders were exchanged or not.


def _exchange_folders(root: Path, entries: Sequence[Entry]) -> None:
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
            _name_twice(root, [e for e in moving if is_visible(e.source) and e.suffix])
            _build(root, folder, other, moving)
            if not swap(other, folder):
                durable.remove(other)
                continue
            crashpoint("parquet.folders_exchanged")
            durable.fsync_path(root)
            durable.fsync_path(other.parent)
            crashpoint("parquet.exchange_synced")
            _finish(root, folder, other, moving)


def _settle_columns(root: Path) -> None:
    """Give topics the columns that they are to have, where no exchange did."""
    for folder in (root / COLUMNS).glob("*/"):
        if (file := folder / parts.COLUMNS_FILE).exists():
            os.replace(file, root / folder.name / parts.COLUMNS_FILE)
            crashpoint("parquet.columns_replaced")
            durable.fsync_path(root / folder.name)
    _forget_columns(root)


def _forget_columns(root: Path) -> None:
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


def _name_twice(root: Path, leaving: Sequence[Entry]) -> None:
    """Give visible files a second name among the kept ones, durably."""
    folders = set()
    for entry in leaving:
        name, kept = root / entry.source, root / entry.kept_path
        if not _is_same(name, kept):
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
            _take_out(path, kept)
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
            not _is_same(theirs, name) and theirs.lstat().st_mtime_ns > name.lstat().st_mtime_ns
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


def _take_out(path: Path, kept: Path) -> None:
    """Move an output to the kept ones, if it is still there."""
    if not os.path.lexists(path):
        return
    if _is_same(path, kept):  # a rename does nothing if both are names of one file
        path.unlink()
    else:
        durable.remove(kept)
        path.rename(kept)
    crashpoint("parquet.moved")


def _is_same(path: Path | str, other: Path | str) -> bool:
    """Whether two names are of one file."""
    try:
        return os.path.samestat(os.lstat(path), os.lstat(other))
    except FileNotFoundError:
        return False


# Outputs as their footers describe them.


def found(root: Path, known: Collection[str] = ()) -> Iterator[tuple[Path, Output]]:
    """The outputs in a sink without a record.

    An earlier release named the file of an output after its key, or in mode `replace` after its
    slot, and moved what was retracted to another folder.

    Args:
        known: output keys; a visible file that is named after one is not opened.

    Raises:
        OSError: a folder or file cannot be read.
    """
    stems = {key[:KEY_DIGITS] for key in known}
    hidden = [*(root / HIDDEN).glob("*/"), *(root / KEPT).glob("*/")]
    for folder in sorted([*root.glob("[!._]*/"), *hidden]):
        for path in parts.list_outputs(folder):
            if folder.parent == root and path.name.removesuffix(".parquet") in stems:
                continue
            with contextlib.suppress(ValueError, KeyError):
                if (footer := parts.footer_of(path)) and footer.facts["topic"] == folder.name:
                    state = _state(path.relative_to(root), footer.facts.get("mode", ""))
                    yield path, output_of("", footer.facts, rows=footer.rows, state=state)


def _state(path: Path, mode: str) -> State:
    if path.is_relative_to(HIDDEN):
        return State.RETRACTED
    if path.is_relative_to(KEPT):
        return State.HIDDEN
    return State.CURRENT if mode == "replace" else State.PAST


def entry_from(root: Path, path: Path, output: Output) -> Entry:
    """The entry of an output that `found` found; its digest is that of its bytes.

    Raises:
        OSError: it cannot be read.
    """
    entry = entry_of(output, str(path.relative_to(root)), parts.digest(path))
    entry = entry.moved(entry.source).told(output)
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="milliseconds")
    return msgspec.structs.replace(entry, shown_at=written if entry.shown_at else "")


def recorded(root: Path, record: Record) -> list[str]:
    """Make the record of a sink that has none; see `Sink.upgrade`.

    Raises:
        SinkConflict: two files hold one output.
        OSError: a file cannot be read.
    """
    entries: dict[str, Entry] = {}
    for path, output in found(root):
        entry = entry_from(root, path, output)
        if other := entries.get(entry.output_key):
            raise SinkConflict(
                f"{path} and {root / other.disk} hold the same output",
                "move the copy elsewhere, then upgrade again: casparian upgrade",
            )
        entries[entry.output_key] = entry
    kept = [
        each if is_visible(each.path) else each.moved(each.kept_path) for each in entries.values()
    ]
    record.put(kept)
    crashpoint("parquet.upgraded")
    counts = Counter(entry.topic for entry in kept)
    return [f"{root / topic}: {count} output(s) recorded" for topic, count in counts.items()]
