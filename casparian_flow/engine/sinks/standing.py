"""Where the outputs of a Parquet sink stand: shown, or kept where no reader looks.

    <root>/<topic>/<name>[.parquet]                        shown
    <root>/.casparian/hidden/<topic>/<name>[.parquet]      retracted

The name is the first digits of the output key; in mode replace, of the slot, so that the outputs of
a slot have one name and what is there is the greatest of them: an output that is smaller comes too
late, and what it finds says so. A retracted output keeps its place in that order.

Between its names an output moves by one rename. After a crash two outputs of a slot may be there,
one of them hidden: the greater one counts, the other is removed when somebody comes by.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    Claim,
    Found,
    found,
    is_disk_fault,
    unavailable,
)
from casparian_flow.engine.sinks.listing import hidden_folder, unknown
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import StagedOutput


class Standing(NamedTuple):
    """An output of ours that is there."""

    path: Path
    told: parts.Told
    hidden: bool

    @property
    def output_key(self) -> str:
        return self.told.facts["output_key"]

    @property
    def order(self) -> tuple[int, int]:
        """Its version's ordinal and its job's id: in mode replace the greatest has the place."""
        return int(self.told.facts.get("ordinal", 0)), int(self.told.facts["job_id"])

    @property
    def name(self) -> str:
        """What its files say that its own should be, without an ending."""
        facts = self.told.facts
        return facts["slot" if facts.get("mode") == "replace" else "output_key"][:KEY_DIGITS]


def name(output: StagedOutput) -> str:
    """What its file or folder is to be called, without an ending."""
    return (output.slot if output.mode == "replace" else output.output_key)[:KEY_DIGITS]


def under(root: Path, topic: str, name: str) -> list[Standing]:
    """What has a name, the one that counts first.

    Raises:
        SinkConflict: something has it that is not ours.
        SinkUnavailable: the disk refused to read it.
    """
    standing = []
    for folder, hidden in ((root / topic, False), (hidden_folder(root, topic), True)):
        for path in (folder / f"{name}.parquet", folder / name):
            if os.path.lexists(path):
                standing.append(_read(path, hidden))
                if standing[-1].name != name:
                    raise _foreign(path)
    if any(each.told.facts.get("mode") == "replace" for each in standing):
        standing.sort(key=lambda each: each.order, reverse=True)
    return standing


def is_ours(path: Path) -> bool:
    """Whether it is an output under the name that its files say.

    Raises:
        SinkUnavailable: the disk refused to read it.
    """
    try:
        return _read(path, hidden=False).name == path.name.removesuffix(".parquet")
    except SinkConflict:
        return False


def fault(path: Path, claim: Claim) -> str:
    """What is wrong with a claimed output; empty where nothing is."""
    try:
        if parts.digest(path) != claim.digest:
            return "its bytes have changed since it was published"
        told = _read(path, hidden=False).told
        if (told.facts.get("output_key"), told.rows) != (claim.output_key, claim.rows):
            return f"it is not the output of job {claim.job_id} with {claim.rows} rows"
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (SinkConflict, SinkUnavailable) as error:
        return error.message
    return ""


def hide(root: Path, claim: Claim) -> None:
    """Take an output out of sight; see `Sink.retract`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if not os.path.lexists(shown):
        return
    if words := fault(shown, claim):
        if _is_replaced(shown, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be retracted: {words}", "casparian verify tells what is wrong"
        )
    atomic.make_folder(hidden.parent)
    _move(shown, hidden)


def show_again(root: Path, claim: Claim) -> None:
    """Undo `hide`; see `Sink.reinstate`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if os.path.lexists(shown):
        if (words := fault(shown, claim)) and not _is_replaced(shown, claim):
            raise SinkConflict(
                f"{shown} is in the place of what was retracted, and was left untouched: {words}",
                "move it elsewhere",
            )
        return
    if words := fault(hidden, claim):
        if _is_replaced(hidden, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be reinstated from {hidden}: {words}",
            "put that file back, or have its job run again: casparian outputs restore",
        )
    atomic.make_folder(shown.parent)
    _move(hidden, shown)


def inventory(root: Path, known: Container[str]) -> Iterator[Found]:
    """What is there of ours under other output keys than those known, and what is hidden; see
    `Sink.inventory`."""
    for path, hidden in unknown(root, known):
        with contextlib.suppress(SinkConflict, ValueError, KeyError, FileNotFoundError):
            each = _read(path, hidden)
            topic = path.parent.name
            named = each.told.facts["topic"], each.name
            mine = named == (topic, path.name.removesuffix(".parquet"))
            if mine and (hidden or each.output_key[:KEY_DIGITS] not in known):
                target, digest = str(root / topic / path.name), parts.digest(path)
                yield found(target, each.told.rows, digest, each.told.facts, retracted=hidden)


def remove(standings: Sequence[Standing]) -> None:
    """Remove what lost its place.

    Raises:
        OSError: something is left.
    """
    for each in standings:
        atomic.remove(each.path)
        crashpoint("parquet.loser_removed")


def _read(path: Path, hidden: bool) -> Standing:
    try:
        standing = Standing(path, parts.told(path), hidden)
        if standing.name and standing.order:  # it says both, or it is not ours
            return standing
        raise ValueError("it says no name")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if is_disk_fault(error) and not isinstance(error, FileNotFoundError | IsADirectoryError):
            raise unavailable(error, path) from error
        raise _foreign(path) from error


def _foreign(path: Path) -> SinkConflict:
    return SinkConflict(
        f"{path} is not the output that its name says; it was left untouched",
        "move it elsewhere, then retry the job",
    )


def _places(root: Path, claim: Claim) -> tuple[Path, Path]:
    """Where a claimed output stands when it is shown, and when it is hidden."""
    name = Path(claim.target).name
    return root / claim.topic / name, hidden_folder(root, claim.topic) / name


def _is_replaced(path: Path, claim: Claim) -> bool:
    """Whether another output of the claimed one's slot has its place by now."""
    try:
        standing = _read(path, hidden=False)
    except SinkConflict:
        return False
    mine = standing.name == path.name.removesuffix(".parquet")
    return mine and standing.output_key != claim.output_key  # two keys, one name: a slot's


def _move(path: Path, target: Path) -> None:
    """Give an output another place, durably. A file may take that of one that has lost it."""
    os.rename(path, target)
    crashpoint("parquet.moved")
    atomic.fsync_path(target.parent)
    atomic.fsync_path(path.parent)
    crashpoint("parquet.move_synced")
