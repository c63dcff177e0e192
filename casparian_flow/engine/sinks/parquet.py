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

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts, standing, topic_folder
from casparian_flow.engine.sinks.base import (
    Claim,
    Found,
    Lineage,
    is_disk_fault,
    lost,
    unavailable,
)
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.engine.sinks.standing import Standing
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
        self.stage_folder = root / atomic.STATE_FOLDER / "stage"
        self._known: dict[str, Any] = {}
        """Columns of topics, as their `_common_metadata` says while we hold the lock."""

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`."""

        folder = self.root / plan.topic

        def united(columns: Any) -> Any:
            return as_staged(topic_folder.columns(folder), columns)

        def known() -> list[str]:
            return list(topic_folder.columns(folder).names)

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
                atomic.own(self.root, glob.escape(topic))
                atomic.make_folder(self.root / topic)
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
                        atomic.remove(Path(output.stage))
                    crashpoint("parquet.unstaged")
        return outcomes

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """See `Sink.check`. Reads every byte of every claimed file."""
        faults = [(claim.target, standing.fault(Path(claim.target), claim)) for claim in claims]
        return [f"{target}: {fault}" for target, fault in faults if fault]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. A file is read if it is new."""
        try:
            yield from standing.inventory(self.root, known)
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
        self._change(standing.hide, claim)

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        self._change(standing.show_again, claim)

    def _change(self, change: Callable[[Path, Claim], None], claim: Claim) -> None:
        try:
            atomic.own(self.root, glob.escape(claim.topic))
            with self._locked():
                change(self.root, claim)
        except OSError as error:
            raise unavailable(error, self.root) from error

    def _locked(self) -> AbstractContextManager[None]:
        return atomic.exclusive(self.root / atomic.STATE_FOLDER / "parquet.lock")

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
                        atomic.remove(found.path)
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
                standing.remove(losers)
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
        return standing.under(self.root, output.topic, standing.name(output))

    def _columns(self, topic: str) -> Any:
        """A topic's columns so far. Raises SinkConflict and OSError as `topic_folder.columns`."""
        if topic not in self._known:
            columns = topic_folder.columns(self.root / topic)
            if not topic_folder.has_columns_file(self.root / topic):
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
            if is_whole and not topic_folder.is_within_double(self.root, output.topic, field.name):
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
        name = self.root / output.topic / standing.name(output)
        digest = output.digest if str(path) == output.stage else parts.digest(path)
        if move.columns is not None:
            topic_folder.set_columns(name.parent, move.columns)
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
        standing.remove([each for each in move.losers if each.path != target])
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
        if not path.name.startswith((".", "_")) and not standing.is_ours(path):
            raise SinkConflict(
                f"topic {folder.name!r} is in mode error, and {path} is not ours",
                "move it elsewhere, then retry the job; or choose another mode: casparian topics",
            )


def _sync(folder: Path) -> SinkUnavailable | None:
    try:
        atomic.fsync_path(folder)
    except OSError as error:
        return unavailable(error, folder)
    crashpoint("parquet.synced")
    return None
