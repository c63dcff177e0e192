"""Files of a Parquet sink as they move, and a sink without a record as its footers describe it.

A reader of a topic's folder sees whole outputs only. A new one appears by `link`, which refuses an
existing name, or if it is a folder of parts by `rename`. An output that takes the place of another
gets its name: the older file is linked to the kept ones first, then the newer one is renamed onto
it, so a reader sees one of them at any time. Two folders are exchanged by `renameat2`. Where the
filesystem has no exchange, or where a folder takes the place of a file, the older one goes first,
and a reader may see neither for an instant. If much changes, or if the columns do, the topic's
whole folder is exchanged first (`parquet_exchange`), and what is below finds it done.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parquet_exchange, parts
from casparian_flow.engine.sinks.base import KEY_DIGITS, output_of
from casparian_flow.engine.sinks.parquet_exchange import is_same, keep, swap, take_out
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
        parquet_exchange.forget_columns(root)
        return []
    leaving = {entry.source: entry for entry in entries if is_visible(entry.source)}
    arriving = [entry for entry in entries if is_visible(entry.path)]
    kept = {root / KEPT / entry.topic for entry in entries if not is_visible(entry.path)}
    for folder in kept:
        durable.make_folder(folder, mode=0o700)
    for topic in {entry.topic for entry in arriving}:
        durable.make_folder(root / topic)
    parquet_exchange.settle(root, entries)
    parquet_exchange.settle_columns(root)
    replaced = [leaving.pop(entry.path, None) for entry in arriving]
    # The rename consumes the newer file: while it is there, the older one has its name.
    pairs = [(entry, older) for entry, older in zip(arriving, replaced, strict=True) if older]
    both = [
        older
        for entry, older in pairs
        if all(os.path.isfile(root / e.source) for e in (entry, older))
    ]
    keep(root, both)
    for entry in leaving.values():
        take_out(root / entry.source, root / entry.kept_path)
    gone, staying = [], []
    for entry, older in zip(arriving, replaced, strict=True):
        if not _show(root, entry, older):
            gone.append(entry.output_key)
            staying += [older.stays()] if older and older.was else []
    for entry in entries:
        if not is_visible(entry.source) and not is_visible(entry.path) and not _keep(root, entry):
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
            if not is_same(source, target):
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
        take_out(root / entry.source, kept)
    if not parts.names(target, entry.output_key):
        if not os.path.lexists(kept):
            return _was_shown(root, entry, older)
        if not swap(kept, target):
            take_out(target, root / older.kept_path)
            kept.rename(target)
            crashpoint("parquet.renamed_in_turn")
            return True
        crashpoint("parquet.exchanged")
    take_out(kept, root / older.kept_path)
    return True


def _was_shown(root: Path, entry: Entry, older: Entry | None) -> bool:
    """Whether an output whose source is gone has its name, or was published once.

    Else the output that it was to replace stays.
    """
    if parts.names(root / entry.path, entry.output_key):
        return True
    if entry.source.startswith(STAGE):
        if older and is_same(root / older.source, root / older.kept_path):
            (root / older.kept_path).unlink()
        return False
    if older:
        take_out(root / older.source, root / older.kept_path)
    return True


def _keep(root: Path, entry: Entry) -> bool:
    """Move an output that was not visible to the kept ones; False as `_show`."""
    kept = root / entry.kept_path
    if entry.source != entry.kept_path:
        take_out(root / entry.source, kept)
    return os.path.lexists(kept) or not entry.source.startswith(STAGE)


def _in_the_way(path: str) -> SinkUnavailable:
    return SinkUnavailable(
        f"cannot write {path}: another program has created it",
        "move it elsewhere, and let only casparian write to that folder; the job then continues by "
        "itself",
    )


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
