"""The Parquet sink: one file for each output, `<root>/<topic>/<output key>.parquet`.

A large output is a folder of files, `<root>/<topic>/<output key>/part-00000.parquet` and so on. A
file is published by `link`, which is atomic and refuses an existing name; a folder by one
`rename`, which refuses a folder that is not empty. In mode replace all outputs of a slot have one
name, and a newer file replaces an older one by `rename`, after the older one's footer has been
checked; such an output is always one file. All of this runs under the sink's lock, so no other
process of Casparian Flow changes anything between a check and the change that follows.

Readers use the columns in the topic's `_common_metadata`. A Worker writes an output with the
topic's columns, united by the rule in `topic_schema.py`. If the topic's columns have changed by
the time of publishing, the staged file is rewritten with the new ones first.
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
    """An output that has passed the checks for publishing."""

    path: Path
    """What to publish: the staged output, or a copy of it with the topic's columns."""
    columns: Any
    """The topic's new columns; None if they do not change."""
    losers: list[Standing]
    """The outputs that it replaces."""


class ParquetSink:
    """A folder of Parquet files.

    Args:
        root: the folder; created with the first output.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_folder = root / durable.STATE_FOLDER / "stage"
        self._known: dict[str, Any] = {}
        """The columns in each topic's `_common_metadata`; valid while the lock is held."""

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
        """See `Sink.publish`. Each topic's folder is synced once for all its outputs."""
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
        """See `Sink.inventory`. Only files that the ledger may not know are read."""
        try:
            yield from list_published(self.root, known)
        except OSError as error:
            raise unavailable(error, self.root) from error

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. Never removes a file, because a user may have altered it."""
        if os.path.lexists(claim.target):
            raise SinkConflict(
                f"{claim.target} exists, and was changed outside Casparian Flow",
                "move it elsewhere, then restore again",
            )

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`. The file or folder moves to the hidden folder."""
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
        """Publish all outputs of one job or, after an error, only those that `_settled` knows."""
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
        """The outcome of an output in a job that failed: it may be published already."""
        try:
            return self._settled(output) or fault
        except (JobError, OSError):
            return fault

    def _settled(self, output: StagedOutput) -> Published | None:
        """The outcome of an output that is published already, or is older than what is shown.

        Raises:
            SinkConflict: something else has its name and must not be replaced.
            OSError, SinkUnavailable: the disk refused.
        """
        existing = self._there(output)
        if not existing:
            return None
        first, *losers = existing
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
        """A topic's columns so far. Raises SinkConflict and OSError as `parts.topic_columns`."""
        if topic not in self._known:
            columns = parts.topic_columns(self.root / topic)
            if not parts.has_topic_columns(self.root / topic):
                return columns
            self._known[topic] = columns
        return self._known[topic]

    def _prepared(self, output: StagedOutput) -> _Move:
        """Make all checks before anything is changed.

        Raises:
            OutputRefused: its values do not fit the types of the topic's columns exactly.
            SinkConflict: `_common_metadata`, or in mode error a file of the topic, is not ours.
            JobError: the staged file is damaged.
            OSError, SinkUnavailable: the disk refused.
            pa.ArrowException, IndexError: the staged file is damaged.
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
        """The topic's columns, with number columns widened as the output needs them.

        A column of integers becomes double only if all its values stay exact. Otherwise it keeps
        its type, and the output will be refused.

        Raises:
            OSError, pa.ArrowException: the disk refused, or the staged file is damaged.
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
        """Give an output its name in the topic's folder, and remove what it replaces.

        Raises:
            SinkConflict: another program has created something of that name meanwhile.
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
                f"cannot write {target}: another program is changing it",
                "let only casparian write to that folder; the job then continues by itself",
            )
        remove_published([each for each in move.losers if each.path != target])
        return Published(target=str(target), rows=output.rows, digest=digest, adopted=False)

    def _fault(self, error: Exception, output: StagedOutput) -> JobError:
        """The error to report for one of the disk or Arrow while an output was published."""
        if not os.path.lexists(output.stage):
            return lost(output, "it is gone")
        if not is_disk_fault(error):
            return lost(output, error)
        if error.errno in _NO_LINKS:
            return SinkUnavailable(
                f"cannot link {output.stage} into {self.root / output.topic}: {error.strerror}",
                "a sink's folder must be on one filesystem that supports hard links",
            )
        return unavailable(error, self.root / output.topic)


def _linked(path: Path, target: Path) -> bool:
    """Link a file to its name; False if the name exists."""
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    crashpoint("parquet.linked")
    return True


def _check_all_ours(folder: Path) -> None:
    """Raise SinkConflict if a topic's folder has a file that is not an output of ours."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((".", "_")) and not is_ours(path):
            raise SinkConflict(
                f"topic {folder.name!r} is in mode error, and Casparian Flow did not write {path}",
                "move it elsewhere, then retry the job; or choose another mode: casparian topics",
            )


def _sync(folder: Path) -> SinkUnavailable | None:
    try:
        durable.fsync_path(folder)
    except OSError as error:
        return unavailable(error, folder)
    crashpoint("parquet.synced")
    return None


# Published outputs in a Parquet sink:
#
#     <root>/<topic>/<name>[.parquet]                        shown
#     <root>/.casparian/hidden/<topic>/<name>[.parquet]      retracted
#
# The name is the first digits of the output key; in mode replace of the slot, so the outputs of a
# slot share one name, and the file is the greatest of them, shown or retracted. An output moves
# between the two folders by one rename. After a crash both may hold an output of the slot: the
# greater one counts, and the next output that is published there removes the other.


class Standing(NamedTuple):
    """A published output."""

    path: Path
    told: parts.Footer
    hidden: bool

    @property
    def output_key(self) -> str:
        return self.told.facts["output_key"]

    @property
    def order(self) -> tuple[int, int]:
        """Its version's ordinal and its job's id: in mode replace the greatest is shown."""
        return int(self.told.facts.get("ordinal", 0)), int(self.told.facts["job_id"])

    @property
    def name(self) -> str:
        """The name that its footer gives it, without an ending."""
        facts = self.told.facts
        return facts["slot" if facts.get("mode") == "replace" else "output_key"][:KEY_DIGITS]


def file_name(output: StagedOutput) -> str:
    """The name of an output's file or folder, without an ending."""
    return (output.slot if output.mode == "replace" else output.output_key)[:KEY_DIGITS]


def published_under(root: Path, topic: str, name: str) -> list[Standing]:
    """The published outputs of a name; the one that counts is the first.

    Raises:
        SinkConflict: something else has the name.
        SinkUnavailable: the disk refused to read it.
    """
    standing = []
    for folder, hidden in ((root / topic, False), (hidden_folder(root, topic), True)):
        for path in (folder / f"{name}.parquet", folder / name):
            if os.path.lexists(path):
                standing.append(_read(path, hidden))
                if standing[-1].name != name:
                    raise _foreign(path)
    if any(output.told.facts.get("mode") == "replace" for output in standing):
        standing.sort(key=lambda output: output.order, reverse=True)
    return standing


def is_ours(path: Path) -> bool:
    """Whether a path is an output that has the name its footer gives.

    Raises:
        SinkUnavailable: the disk refused to read it.
    """
    try:
        return _read(path, hidden=False).name == path.name.removesuffix(".parquet")
    except SinkConflict:
        return False


def fault_of(path: Path, claim: Claim) -> str:
    """What is wrong with a claimed output; empty if nothing is."""
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
    """Hide an output; see `Sink.retract`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if not os.path.lexists(shown):
        return
    if fault := fault_of(shown, claim):
        if _is_replaced(shown, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be retracted: {fault}", "casparian verify   (shows what is wrong)"
        )
    durable.make_folder(hidden.parent)
    _move(shown, hidden)


def show_again(root: Path, claim: Claim) -> None:
    """Undo `hide_published`; see `Sink.reinstate`. The caller holds the sink's lock.

    Raises:
        SinkConflict, OSError: as there.
    """
    shown, hidden = _places(root, claim)
    if os.path.lexists(shown):
        if (fault := fault_of(shown, claim)) and not _is_replaced(shown, claim):
            raise SinkConflict(
                f"{shown} is in the way of the retracted file, and was left untouched: {fault}",
                "move it elsewhere",
            )
        return
    if fault := fault_of(hidden, claim):
        if _is_replaced(hidden, claim):
            return
        raise SinkConflict(
            f"{shown} cannot be reinstated from {hidden}: {fault}",
            "restore that file, or run its job again: casparian outputs restore",
        )
    durable.make_folder(shown.parent)
    _move(hidden, shown)


def list_published(root: Path, known: Container[str]) -> Iterator[Found]:
    """See `Sink.inventory`."""
    for path, hidden in unknown_outputs(root, known):
        with contextlib.suppress(SinkConflict, ValueError, KeyError, FileNotFoundError):
            output = _read(path, hidden)
            topic = path.parent.name
            named = output.told.facts["topic"], output.name
            mine = named == (topic, path.name.removesuffix(".parquet"))
            if mine and (hidden or output.output_key[:KEY_DIGITS] not in known):
                target, digest = str(root / topic / path.name), parts.digest(path)
                yield found(target, output.told.rows, digest, output.told.facts, retracted=hidden)


def remove_published(standings: Sequence[Standing]) -> None:
    """Remove outputs that were replaced.

    Raises:
        OSError: one is left.
    """
    for output in standings:
        durable.remove(output.path)
        crashpoint("parquet.loser_removed")


def _read(path: Path, hidden: bool) -> Standing:
    try:
        standing = Standing(path, parts.read_footer(path), hidden)
        if standing.name and standing.order:  # both need facts that only our footers have
            return standing
        raise ValueError("its name is missing")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if is_disk_fault(error) and not isinstance(error, FileNotFoundError | IsADirectoryError):
            raise unavailable(error, path) from error
        raise _foreign(path) from error


def _foreign(path: Path) -> SinkConflict:
    return SinkConflict(
        f"{path} does not contain the output that its name stands for; it was left untouched",
        "move it elsewhere, then retry the job",
    )


def _places(root: Path, claim: Claim) -> tuple[Path, Path]:
    """The paths of a claimed output while it is shown, and while it is hidden."""
    name = Path(claim.target).name
    return root / claim.topic / name, hidden_folder(root, claim.topic) / name


def _is_replaced(path: Path, claim: Claim) -> bool:
    """Whether the file is now another output of the claimed one's slot."""
    try:
        standing = _read(path, hidden=False)
    except SinkConflict:
        return False
    mine = standing.name == path.name.removesuffix(".parquet")
    return mine and standing.output_key != claim.output_key  # two keys, one name: a slot's


def _move(path: Path, target: Path) -> None:
    """Rename an output durably. It may replace a file that lost its slot."""
    os.rename(path, target)
    crashpoint("parquet.moved")
    durable.fsync_path(target.parent)
    durable.fsync_path(path.parent)
    crashpoint("parquet.move_synced")
