"""The Parquet sink: `<root>/<topic>/<output key>.parquet`, one file an output.

A large output is a folder of files, `<root>/<topic>/<output key>/part-00000.parquet` and so on. A
file appears by `link`, which shows the whole file or none and refuses a name that exists; a folder
by one `rename`, which refuses a folder that is not empty. In mode replace the outputs of a slot
have one name, and a file takes the place of an older one by `rename`, once that one's footer has
proved it ours and older; so such an output is always one file. `standing.py` says what a name
means. All of it happens under the sink's lock: nobody of ours is between a look and what follows.

Readers take the files of a topic with the columns in `_common_metadata` beside them; the columns
of outputs differ by a rule (`topic_schema.py`). A Worker writes what the rule asks for. Where
another output was quicker and the topic's columns have changed since, what was staged is written
again with them before it is published.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    Claim,
    Found,
    Lineage,
    found,
    hidden_folder,
    is_disk_fault,
    lost,
    unavailable,
    unknown_outputs,
)
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.engine.sinks.topic_schema import (
    LINEAGE_FIELDS,
    as_staged,
    own_columns,
    unite,
    wider,
)
from casparian_flow.errors import JobError, SinkConflict, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, StagedOutput

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}


class _Move(NamedTuple):
    """An output that may be shown, and how."""

    path: Path
    """What is shown: what was staged, or a copy of it with the topic's columns."""
    columns: Any
    """The topic's columns with it; None where they stay as they are."""
    losers: list[Standing]
    """What it takes the place of."""


class ParquetSink:
    """A folder of Parquet files.

    Args:
        root: the folder; created with the first output.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_folder = root / durable.STATE_FOLDER / "stage"
        self._known: dict[str, Any] = {}
        """Columns of topics, as their `_common_metadata` says while we hold the lock."""

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`."""

        folder = self.root / plan.topic

        def united(columns: Any) -> Any:
            return as_staged(parts.topic_columns(folder), columns)

        def known() -> list[str]:
            return list(parts.topic_columns(folder).names)

        split_bytes = 0 if plan.mode == "replace" else plan.split_bytes
        return Stage(
            self.stage_folder, plan, lineage, attempt, unite=united, split_bytes=split_bytes,
            known=known,
        )  # fmt: skip

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. Each topic's folder is made durable once for all its outputs."""
        jobs: dict[int, list[StagedOutput]] = {}
        for output in outputs:
            jobs.setdefault(output.job_id, []).append(output)
        try:
            for topic in dict.fromkeys(output.topic for output in outputs):
                durable.own(self.root, glob.escape(topic))
                durable.make_folder(self.root / topic)
                crashpoint("parquet.owned")
            with self._locked():
                self._known.clear()
                ended = {job: iter(self._publish(of)) for job, of in jobs.items()}
        except OSError as error:
            return [unavailable(error, self.root)] * len(outputs)
        outcomes = [next(ended[output.job_id]) for output in outputs]
        folders = {Path(o.target).parent for o in outcomes if isinstance(o, Published)}
        failed = {folder: fault for folder in folders if (fault := _sync(folder))}
        for number, (output, outcome) in enumerate(zip(outputs, outcomes, strict=True)):
            if isinstance(outcome, Published):
                if fault := failed.get(Path(outcome.target).parent):
                    outcomes[number] = fault
                else:
                    with contextlib.suppress(OSError):
                        durable.remove(Path(output.stage))
                    crashpoint("parquet.unstaged")
        return outcomes

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """See `Sink.check`. Reads every byte of every claimed file."""
        faults = [(claim.target, fault_of(Path(claim.target), claim)) for claim in claims]
        return [f"{target}: {fault}" for target, fault in faults if fault]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. A file is read if it is new."""
        try:
            yield from list_published(self.root, known)
        except OSError as error:
            raise unavailable(error, self.root) from error

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. We remove no file: what is there may be a person's work."""
        if os.path.lexists(claim.target):
            raise SinkConflict(
                f"{claim.target} is there, and was altered", "move it elsewhere, then restore again"
            )

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`. The file or folder moves to where no reader looks."""
        self._change(hide_published, claim)

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        self._change(show_again, claim)

    def _change(self, change: Callable[[Path, Claim], None], claim: Claim) -> None:
        try:
            durable.own(self.root, glob.escape(claim.topic))
            with self._locked():
                change(self.root, claim)
        except OSError as error:
            raise unavailable(error, self.root) from error

    def _locked(self) -> AbstractContextManager[None]:
        return durable.exclusive(self.root / durable.STATE_FOLDER / "parquet.lock")

    def _publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """All outputs of one job, or none but those that need no showing; under the lock."""
        looked: list[Published | _Move] = []
        output = outputs[0]
        try:
            for output in outputs:
                looked.append(self._settled(output) or self._prepared(output))
            outcomes: list[Published | JobError] = []
            for output, found in zip(outputs, looked, strict=True):
                shown = found if isinstance(found, Published) else self._show(output, found)
                outcomes.append(shown)
            return outcomes
        except (JobError, OSError, pa.ArrowException, IndexError) as error:
            fault = error if isinstance(error, JobError) else self._fault(error, output)
        finally:
            for output, found in zip(outputs, looked, strict=False):
                if isinstance(found, _Move) and str(found.path) != output.stage:
                    with contextlib.suppress(OSError):
                        durable.remove(found.path)
        return [self._settled_in_spite_of(fault, output) for output in outputs]

    def _settled_in_spite_of(self, fault: JobError, output: StagedOutput) -> Published | JobError:
        """What another output's fault does not touch: it was published before, or just now."""
        try:
            return self._settled(output) or fault
        except (JobError, OSError):
            return fault

    def _settled(self, output: StagedOutput) -> Published | None:
        """What stands for an output that was published before, or comes too late.

        Raises:
            SinkConflict: what has its name is not it, and it cannot take that place.
            OSError, SinkUnavailable: the disk refused.
        """
        there = self._there(output)
        if not there:
            return None
        first, *losers = there
        target = self.root / output.topic / first.path.name
        if first.output_key == output.output_key and first.told.rows == output.rows:
            if output.mode == "replace":
                remove_published(losers)
            digest = parts.digest(first.path)
            return Published(
                target=str(target), rows=output.rows, digest=digest, adopted=True,
                retracted=first.hidden,
            )  # fmt: skip
        if output.mode != "replace" or first.output_key == output.output_key:
            raise SinkConflict(
                f"{first.path} is not the output of this job; it was left untouched",
                "move it elsewhere, then retry the job",
            )
        if first.order > (output.ordinal, output.job_id):
            return Published(
                target=str(target), rows=output.rows, digest=output.digest, adopted=False
            )
        return None

    def _there(self, output: StagedOutput) -> list[Standing]:
        return published_under(self.root, output.topic, file_name(output))

    def _columns(self, topic: str) -> Any:
        """A topic's columns so far. Raises SinkConflict and OSError as `topic_folder.columns`."""
        if topic not in self._known:
            columns = parts.topic_columns(self.root / topic)
            if not parts.has_topic_columns(self.root / topic):
                return columns
            self._known[topic] = columns
        return self._known[topic]

    def _prepared(self, output: StagedOutput) -> _Move:
        """Look whether everything is as it must be, before anything is changed.

        Raises:
            OutputRefused: its values are not exactly ones of the topic's columns.
            SinkConflict: what tells the topic's columns, or what mode error finds, is not ours.
            JobError: what was staged is damaged.
            OSError, SinkUnavailable: the disk refused.
            pa.ArrowException, IndexError: what was staged is damaged.
        """
        stage, folder = Path(output.stage), self.root / output.topic
        if (size := parts.size(stage)) != output.size_bytes:
            raise lost(output, f"it has {size} bytes, not {output.size_bytes}")
        if output.mode == "error":
            _check_all_ours(folder)
        staged = own_columns(pq.read_schema(parts.files(stage)[0]))
        known = self._columns(output.topic)
        wanted = self._widened(output, unite(known, staged), staged)
        shown = stage
        if any(wanted.field(field.name).type != field.type for field in staged):
            columns = pa.schema([*wanted, *LINEAGE_FIELDS])
            shown = parts.rewritten(stage, output.topic, columns)
            crashpoint("parquet.rewritten")
        stays = output.topic in self._known and wanted.equals(known)
        losers = self._there(output) if output.mode == "replace" else []
        return _Move(shown, None if stays else wanted, losers)

    def _widened(self, output: StagedOutput, columns: Any, staged: Any) -> Any:
        """The topic's columns, those of numbers as wide as an output needs them to be.

        Whole numbers become doubles only where they all are exact. Else the column stays as it is,
        and the output will be refused.

        Raises:
            OSError, pa.ArrowException: the disk refused, or what was staged is damaged.
        """
        for number, field in enumerate(columns):
            if field.name not in staged.names:
                continue
            wide = wider(field.type, staged.field(field.name).type)
            if wide is None or parts.are_exact(Path(output.stage), field.name, field.type):
                continue
            is_whole = pa.types.is_integer(field.type) and pa.types.is_floating(wide)
            if is_whole and not parts.topic_is_within_double(self.root, output.topic, field.name):
                continue
            columns = columns.set(number, field.with_type(wide))
        return columns

    def _show(self, output: StagedOutput, move: _Move) -> Published:
        """Give an output its name among the topic's, and what it replaces none any more.

        Raises:
            SinkConflict: somebody was quicker who is not of ours.
            OSError, SinkUnavailable: the disk refused.
        """
        path = move.path
        name = self.root / output.topic / file_name(output)
        digest = output.digest if str(path) == output.stage else parts.digest(path)
        if move.columns is not None:
            parts.set_topic_columns(name.parent, move.columns)
            self._known[output.topic] = move.columns
        target = name if path.is_dir() else name.with_suffix(".parquet")
        if any(each.path == target for each in move.losers):
            os.replace(path, target)
            crashpoint("parquet.replaced")
        elif path.is_dir() and not os.path.lexists(target):
            path.rename(target)
            crashpoint("parquet.renamed")
        elif path.is_dir() or not _linked(path, target):
            if settled := self._settled(output):
                return settled
            raise SinkUnavailable(
                f"cannot write {target}: somebody else is changing it",
                "leave that folder to casparian; the job goes on by itself",
            )
        remove_published([each for each in move.losers if each.path != target])
        return Published(target=str(target), rows=output.rows, digest=digest, adopted=False)

    def _fault(self, error: Exception, output: StagedOutput) -> JobError:
        """What the disk or Arrow said while an output was published, in our words."""
        if not os.path.lexists(output.stage):
            return lost(output, "it is gone")
        if not is_disk_fault(error):
            return lost(output, error)
        if error.errno in _NO_LINKS:
            return SinkUnavailable(
                f"cannot link {output.stage} into {self.root / output.topic}: {error.strerror}",
                "a sink's folder must lie on one filesystem, one that has hard links",
            )
        return unavailable(error, self.root / output.topic)


def _linked(path: Path, target: Path) -> bool:
    """Give a file its name; False where something has it."""
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    crashpoint("parquet.linked")
    return True


def _check_all_ours(folder: Path) -> None:
    """Raises SinkConflict where a topic's folder has what is not an output of ours."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((".", "_")) and not is_ours(path):
            raise SinkConflict(
                f"topic {folder.name!r} is in mode error, and {path} is not ours",
                "move it elsewhere, then retry the job; or choose another mode: casparian topics",
            )


def _sync(folder: Path) -> SinkUnavailable | None:
    try:
        durable.fsync_path(folder)
    except OSError as error:
        return unavailable(error, folder)
    crashpoint("parquet.synced")
    return None


# Where the outputs of a Parquet sink stand: shown, or kept where no reader looks.
#
#     <root>/<topic>/<name>[.parquet]                        shown
#     <root>/.casparian/hidden/<topic>/<name>[.parquet]      retracted
#
# The name is the first digits of the output key; in mode replace, of the slot, so that the outputs
# of a slot have one name and what is there is the greatest of them: an output that is smaller comes
# too late, and what it finds says so. A retracted output keeps its place in that order.
#
# Between its names an output moves by one rename. After a crash two outputs of a slot may be there,
# one of them hidden: the greater one counts, the other is removed when somebody comes by.


class Standing(NamedTuple):
    """An output of ours that is there."""

    path: Path
    told: parts.Footer
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


def file_name(output: StagedOutput) -> str:
    """What its file or folder is to be called, without an ending."""
    return (output.slot if output.mode == "replace" else output.output_key)[:KEY_DIGITS]


def published_under(root: Path, topic: str, name: str) -> list[Standing]:
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


def fault_of(path: Path, claim: Claim) -> str:
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


def hide_published(root: Path, claim: Claim) -> None:
    """Take an output out of sight; see `Sink.retract`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if not os.path.lexists(shown):
        return
    if words := fault_of(shown, claim):
        if _is_replaced(shown, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be retracted: {words}", "casparian verify tells what is wrong"
        )
    durable.make_folder(hidden.parent)
    _move(shown, hidden)


def show_again(root: Path, claim: Claim) -> None:
    """Undo `hide`; see `Sink.reinstate`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if os.path.lexists(shown):
        if (words := fault_of(shown, claim)) and not _is_replaced(shown, claim):
            raise SinkConflict(
                f"{shown} is in the place of what was retracted, and was left untouched: {words}",
                "move it elsewhere",
            )
        return
    if words := fault_of(hidden, claim):
        if _is_replaced(hidden, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be reinstated from {hidden}: {words}",
            "put that file back, or have its job run again: casparian outputs restore",
        )
    durable.make_folder(shown.parent)
    _move(hidden, shown)


def list_published(root: Path, known: Container[str]) -> Iterator[Found]:
    """What is there of ours under other output keys than those known, and what is hidden; see
    `Sink.inventory`."""
    for path, hidden in unknown_outputs(root, known):
        with contextlib.suppress(SinkConflict, ValueError, KeyError, FileNotFoundError):
            each = _read(path, hidden)
            topic = path.parent.name
            named = each.told.facts["topic"], each.name
            mine = named == (topic, path.name.removesuffix(".parquet"))
            if mine and (hidden or each.output_key[:KEY_DIGITS] not in known):
                target, digest = str(root / topic / path.name), parts.digest(path)
                yield found(target, each.told.rows, digest, each.told.facts, retracted=hidden)


def remove_published(standings: Sequence[Standing]) -> None:
    """Remove what lost its place.

    Raises:
        OSError: something is left.
    """
    for each in standings:
        durable.remove(each.path)
        crashpoint("parquet.loser_removed")


def _read(path: Path, hidden: bool) -> Standing:
    try:
        standing = Standing(path, parts.read_footer(path), hidden)
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
    durable.fsync_path(target.parent)
    durable.fsync_path(path.parent)
    crashpoint("parquet.move_synced")
