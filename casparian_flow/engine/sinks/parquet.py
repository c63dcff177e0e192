"""The Parquet sink: one file for each output, `<root>/<topic>/<name>.parquet`.

A large output is a folder of files, `<root>/<topic>/<name>/part-00000.parquet` and so on. Names
make outputs visible, the record (`parquet_record`) says what else there is. Each call that changes
something runs under the sink's lock:

1. What an earlier process left undone is done (`parquet_moves.settle`).
2. The call is planned as a whole (`_Plan`): all checks, and where each file is to be.
3. One transaction records the plan; the files move; one transaction records that they have moved.

The name of a visible output is that of its slot: of the version in modes `append` and `error`, of
the location in mode `replace`. If it takes the place of another output it gets that one's name, so
that one rename exchanges them. If the name is in use it is the output key.

Readers use the columns in the topic's `_common_metadata`. A Worker writes an output with the
topic's columns, united by the rule in `topic_schema.py`. If the topic's columns have changed by
the time of publishing, the staged file is rewritten with the new ones first.

A rebuilt output keeps columns of its own if they are not the topic's: those of all rebuilt outputs
of the topic are united in the folder where they are kept. When they are shown, the topic's columns
are united anew from the files that are to be visible.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import (
    parquet_moves,
    parquet_record,
    parts,
    topic_schema,
)
from casparian_flow.engine.sinks.base import KEY_DIGITS, is_disk_fault, lost, unavailable
from casparian_flow.engine.sinks.parquet_record import (
    KEPT,
    STAGE,
    Entry,
    Record,
    entry_of,
    is_visible,
)
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.engine.sinks.topic_schema import (
    LINEAGE_FIELDS,
    as_staged,
    unite,
    wider,
)
from casparian_flow.errors import JobError, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication, State

_LISTED = 20
"""How many files a message names."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}


class ParquetSink:
    """A folder of Parquet files.

    Args:
        root: the folder; created with the first output.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_folder = root / parquet_record.STAGE

    def open_stage(self, output: Output, attempt: str) -> Stage:
        """See `Sink.open_stage`."""
        folder = self.root / output.topic

        def united(columns: Any) -> Any:
            if (
                output.generation and not output.keeps_columns
            ):  # what the topic will be when it is shown is not known yet
                return unite(pa.schema([]), columns)
            return as_staged(parts.topic_columns(folder), columns)

        def known() -> list[str]:
            return list(parts.topic_columns(folder).names)

        return Stage(
            self.stage_folder, output, attempt, unite=united, split_bytes=output.split_bytes,
            known=known,
        )  # fmt: skip

    def publish(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """See `Sink.publish`. Two transactions, and one sync of each topic's folder, for all."""
        try:
            for topic in dict.fromkeys(o.topic for job in jobs for o in job.outputs):
                durable.own(self.root, glob.escape(topic))
                durable.make_folder(self.root / topic)
                crashpoint("parquet.owned")
            told = [output for job in jobs for output in (*job.outputs, *job.changes)]
            with self._planning(told) as plan:
                faults = [plan.add(job) for job in jobs]
                plan.carry_out()
        except OSError as error:
            return [refused(error, self.root)] * len(jobs)
        except SinkUnavailable as error:
            return [error] * len(jobs)
        outcomes: list[list[Output] | JobError] = []
        for job, refusal in zip(jobs, faults, strict=True):
            gone = [output for output in job.outputs if output.output_key in plan.gone]
            fault = refusal or (lost(gone[0], "it is gone") if gone else None)
            outcomes.append(fault or [plan.published(output) for output in job.outputs])
            for output in job.outputs if not fault else ():
                if output.stage:
                    with contextlib.suppress(OSError):
                        durable.remove(Path(output.stage))
                    crashpoint("parquet.unstaged")
        return outcomes

    def change(self, outputs: Sequence[Output]) -> None:
        """See `Sink.change`. Outputs of one slot are exchanged by one rename."""
        self._do(outputs, lambda plan: plan.tell(outputs))

    def delete(self, outputs: Sequence[Output]) -> None:
        """See `Sink.delete`. A visible file that was altered is never removed."""
        self._do(outputs, _Plan.delete)

    def check(self, outputs: Sequence[Output]) -> list[str]:
        """See `Sink.check`. Reads every byte of every output that has rows."""
        try:
            with self._reading() as record:
                entries = record.entries(o.output_key for o in outputs) if record else {}
                compared = [
                    self._difference(entries.get(output.output_key), output)
                    if record
                    else self._difference_of_old(output)
                    for output in outputs
                ]
        except SinkUnavailable as error:
            compared = [(Path(output.target), error.message) for output in outputs]
        return [f"{place}: {fault}" for place, fault in compared if fault]

    def records(self, known: Collection[str]) -> Iterator[Output]:
        """See `Sink.records`. Without a record, files that the ledger may not know are read."""
        try:
            with self._reading() as record:
                entries = record.all() if record else self._entries_of_old(known)
                return iter(parquet_record.outputs(self.root, entries, known))
        except OSError as error:
            raise unavailable(error, self.root) from error

    def upgrade(self) -> list[str]:
        """See `Sink.upgrade`. Builds the record from footers; visible files stay as they are."""
        if self._is_new():
            return []
        with self._locked() as record:
            words = [] if record.exists else parquet_moves.recorded(self.root, record)
            parquet_moves.settle(self.root, record)
            durable.remove(self.root / parquet_moves.HIDDEN)
            durable.fsync_path(self.root / durable.STATE_FOLDER)
        return words

    def _is_new(self) -> bool:
        """Whether nothing was ever published here. Raises OSError as `found`."""
        is_recorded = parquet_record.path_of(self.root).exists()
        return not is_recorded and not any(parquet_moves.found(self.root))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Record]:
        """The record under the sink's lock.

        Raises:
            SinkUnavailable, OSError: the disk refused.
        """
        state = self.root / durable.STATE_FOLDER
        durable.make_folder(state, mode=0o700)
        with (
            durable.exclusive(state / "parquet.lock"),
            parquet_record.opened(self.root, write=True) as record,
        ):
            assert record is not None
            yield record

    @contextlib.contextmanager
    def _planning(self, outputs: Sequence[Output]) -> Iterator[_Plan]:
        """A plan for these outputs, after what was left undone has been done.

        Raises:
            SinkUnavailable: the sink is to be upgraded first, or the disk refused.
            OSError: the disk refused.
        """
        with self._locked() as record:
            if not record.exists and any(parquet_moves.found(self.root)):
                raise SinkUnavailable(
                    f"{self.root} was written by an earlier release, or its record is lost",
                    "casparian upgrade",
                )
            parquet_moves.settle(self.root, record)
            yield _Plan(self.root, record, [output.output_key for output in outputs])

    def _do(self, outputs: Sequence[Output], change: Callable[[_Plan], None]) -> None:
        """Change outputs, if anything was ever published here; OSErrors are SinkUnavailable."""
        try:
            if not self._is_new():
                with self._planning(outputs) as plan:
                    change(plan)
                    plan.carry_out()
        except OSError as error:
            raise refused(error, self.root) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Record | None]:
        """The record, after what was left undone has been done; None if there is none."""
        with parquet_record.opened(self.root, write=False) as record:
            if not record or not record.moving():
                yield record
                return
        with self._planning([]) as plan:
            yield plan.record

    def _entries_of_old(self, known: Collection[str]) -> Iterator[Entry]:
        for path, output in parquet_moves.found(self.root, known):
            if output.state == State.RETRACTED or output.output_key not in known:
                with contextlib.suppress(FileNotFoundError):
                    yield parquet_moves.entry_from(self.root, path, output)

    def _difference(self, entry: Entry | None, output: Output) -> tuple[Path, str]:
        """Where an output is, and how it differs from what the ledger says of it."""
        if entry is None:
            return Path(output.target), "the sink has no record of it"
        path = self.root / (entry.path or entry.topic)
        told = output.visible if entry.path else False
        if entry.rows != output.rows:
            return path, f"it has {entry.rows} rows, not {output.rows}"
        if entry.state != output.state or is_visible(entry.path) != told:
            states = f"{entry.state} in mode {entry.mode}", f"{output.state} in mode {output.mode}"
            return path, f"it is {states[0]}, not {states[1]}"
        return path, _difference_of_bytes(path, output.digest) if entry.path else ""

    def _difference_of_old(self, output: Output) -> tuple[Path, str]:
        """Where an output of a sink without a record is, and what is wrong with it."""
        retracted = output.state == State.RETRACTED
        folder = Path(parquet_moves.HIDDEN if retracted else "") / output.topic
        path = self.root / folder / Path(output.target).name
        if not (retracted or output.visible) or not output.target:
            return path, ""  # an earlier release kept no others
        if fault := _difference_of_bytes(path, output.digest):
            return path, fault
        footer = parts.footer_of(path)
        told = (footer.facts["output_key"], footer.rows) if footer else None
        if told != (output.output_key, output.rows):
            return path, f"it is not the output of job {output.job_id} with {output.rows} rows"
        return path, ""


def _difference_of_bytes(path: Path, digest: str) -> str:
    try:
        if parts.digest(path) != digest:
            return "its bytes have changed since it was published"
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return ""


_PLANNED = ("_entries", "_columns", "_anew", "_taken", "_left")
"""What a plan is; taken back if a job of it fails."""


class _Plan:
    """What one call changes, planned job by job before anything is changed.

    Args:
        record: the sink's.
        keys: the output keys that the call names.
    """

    def __init__(self, root: Path, record: Record, keys: Sequence[str]) -> None:
        self.record = record
        self._root = root
        self._before = record.entries(keys)
        self._entries = dict(self._before)
        self.gone: set[str] = set()
        """Keys of outputs whose staged files vanished before they were published."""
        self._deleted: list[str] = []
        self._checked: set[tuple[str, str]] = set()
        """Topics and modes whose folders `_check_folder` found well."""
        self._columns: dict[str, Any] = {}
        """Columns as the plan leaves them, by folder: each topic's, and those of its kept outputs
        that were rebuilt."""
        self._found: dict[str, tuple[Any, bool]] = {}
        """Columns before the plan, by folder, and whether its `_common_metadata` has them."""
        self._anew: set[str] = set()
        """Topics whose columns change together with their files."""
        self._taken: set[str] = set()
        """Names in topics, without an ending, that the plan gives to outputs."""
        self._left: set[str] = set()
        """Paths that the plan takes outputs away from."""
        self._copies: list[Path] = []

    def add(self, job: Publication) -> JobError | None:
        """Plan a job, or nothing of it: then the error is returned."""
        told = [*job.outputs, *job.changes]
        if not told:
            return None
        planned = (self._entries.get(output.output_key) for output in told if output.visible)
        if any(entry and is_visible(entry.source) for entry in planned):
            self.carry_out()  # it is planned to leave: one plan does not bring it back as well
        saved = {name: copy(getattr(self, name)) for name in _PLANNED}
        output = told[0]
        try:
            for output in job.outputs:
                entry = self._entries.get(output.output_key)
                is_lost = entry and entry.disk and output.stage and not self._has(entry.disk)
                if not entry or is_lost:
                    self._entries[output.output_key] = self._staged(output)
                    self._check_name(output)
            self.tell(told)
            return None
        except (JobError, OSError, pa.ArrowException, IndexError) as error:
            vars(self).update(saved)
            return error if isinstance(error, JobError) else self._fault(error, output)

    def tell(self, outputs: Sequence[Output]) -> None:
        """Plan the state and mode of outputs, and where their files will be.

        Raises:
            SinkConflict: an output that is to be visible is gone or altered, another program's
                file has its name, or its columns cannot be shown with those of files that stay.
            OSError: the disk refused.
        """
        arriving: list[Output] = []
        leaving: list[tuple[Output, str]] = []
        for output in outputs:
            if not (entry := self._entries.get(output.output_key)):
                continue
            before, entry = entry, entry.told(output)
            self._entries[output.output_key] = entry
            if output.visible and entry.disk and not is_visible(entry.path):
                self._check_whole(entry)
                arriving.append(output)
            elif not output.visible and entry.disk and not entry.path.startswith(KEPT):
                if entry.path:
                    entry = self._left_by(entry, before)
                    leaving.append((output, _stem(entry.path)))
                self._entries[output.output_key] = entry.moved(entry.kept_path)
        for output, stem in _paired(arriving, leaving):
            self._appear(output, stem)
        for topic in dict.fromkeys(o.topic for o in arriving if self._is_other(o)):
            self._unite_anew(topic)

    def delete(self) -> None:
        """Plan that all outputs are deleted.

        Raises:
            SinkConflict: a visible one was altered.
            OSError: the disk refused.
        """
        for key, entry in self._entries.items():
            path = self._root / entry.path
            is_there = is_visible(entry.path) and os.path.lexists(path)
            if is_there and parts.digest(path) != entry.digest:
                raise SinkConflict(
                    f"{path} exists, and was changed outside Casparian Flow",
                    "move it elsewhere, then restore again",
                )
            if entry.path:
                hidden = msgspec.structs.replace(entry, state=State.HIDDEN.value)
                self._entries[key] = hidden.moved("")
            else:
                self._deleted.append(key)

    def carry_out(self) -> None:
        """Record the plan, and do it.

        Raises:
            SinkUnavailable, OSError: the disk refused. What is recorded is done by the next call.
        """
        for folder, columns in self._columns.items():
            if self._found[folder] != (columns, True):
                is_anew = folder in self._anew
                place = self._root / (parquet_moves.COLUMNS if is_anew else "") / folder
                durable.make_folder(place, mode=0o700)
                parts.set_topic_columns(place, columns)
                self._found[folder] = columns, True
        changed = [each for key, each in self._entries.items() if each != self._before.get(key)]
        if changed or self._deleted:
            self.record.put(changed, self._deleted)
            crashpoint("parquet.recorded")
            self.gone.update(parquet_moves.settle(self._root, self.record))
        for fitted in self._copies:
            with contextlib.suppress(OSError):
                durable.remove(fitted)
        self._entries = {key: each.settled() for key, each in self._entries.items()}
        self._before, self._taken, self._left = dict(self._entries), set(), set()
        self._anew = set()

    def published(self, output: Output) -> Output:
        """An output as it is now."""
        entry = self._entries[output.output_key]
        return msgspec.structs.replace(
            output, rows=entry.rows, digest=entry.digest, shown_at=entry.shown_at,
            hidden_at=entry.hidden_at, target=f"{self._root}/{entry.path or entry.topic}",
        )  # fmt: skip

    def _has(self, path: str) -> bool:
        return os.path.lexists(f"{self._root}/{path}")

    def _left_by(self, entry: Entry, before: Entry) -> Entry:
        """The entry of an output that ceases to be visible; its name is free."""
        path = self._root / entry.path
        self._taken.discard(entry.path.removesuffix(".parquet"))
        if entry.source:
            return entry
        if os.path.lexists(path) and not parts.names(path, entry.output_key):
            raise _foreign(path)
        self._left.add(entry.path)
        return msgspec.structs.replace(entry, was=f"{before.state} {before.mode}")

    def _check_whole(self, entry: Entry) -> None:
        path = self._root / entry.path
        if not entry.source and (fault := _difference_of_bytes(path, entry.digest)):
            raise SinkConflict(
                f"{path} cannot be shown again, and its sink was left as it is: {fault}",
                "restore that file, or run its job again: casparian outputs restore "
                f"{entry.job_id}",
            )

    def _appear(self, output: Output, stem: str) -> None:
        """Plan the name of an output that becomes visible.

        Args:
            stem: the name of the output whose place it takes; empty if there is none.
        """
        entry, topic = self._entries[output.output_key], output.topic
        for name in filter(None, (stem, _slot_of(output), entry.output_key[:KEY_DIGITS])):
            if f"{topic}/{name}" in self._taken:
                continue
            there = self._named(f"{topic}/{name}")
            new = self._adopted(entry, there) if there else None
            if new or not there:
                new = new or entry.moved(f"{topic}/{name}{entry.suffix}")
                self._entries[output.output_key] = new
                self._taken.add(f"{topic}/{name}")
                return
        raise _foreign(self._root / topic / entry.output_key[:KEY_DIGITS])

    def _adopted(self, entry: Entry, path: str) -> Entry | None:
        """The entry with the file at its name, if that is its own, though nothing recorded it;
        None if another output has the name.

        Raises:
            SinkConflict: something else has it.
        """
        footer = parts.footer_of(self._root / path)
        key = footer.facts["output_key"] if footer else ""
        if footer and (key, footer.rows) == (entry.output_key, entry.rows):
            digest = parts.digest(self._root / path)
            return msgspec.structs.replace(entry, path=path, source="", digest=digest)
        other = self.record.entries([key]).get(key)
        if other is None or other.path != path:
            raise _foreign(self._root / path)
        return None

    def _staged(self, output: Output) -> Entry:
        """The entry of an output that is not recorded yet.

        Raises:
            OutputRefused: its values do not fit the types of the topic's columns exactly.
            SinkConflict: `_common_metadata`, or in mode error a file of the topic, is not ours.
            JobError: the staged file is damaged.
            OSError, SinkUnavailable: the disk refused.
            pa.ArrowException, IndexError: the staged file is damaged.
        """
        if not output.stage:
            return entry_of(output, "", "")
        stage = Path(output.stage)
        if (size := parts.size(stage)) != output.size_bytes:
            raise lost(output, f"it has {size} bytes, not {output.size_bytes}")
        if (output.topic, output.mode) not in self._checked:
            self._check_folder(output)
        staged = parts.own_schema(stage)
        folder, known = output.topic, self._known(output.topic)
        if output.generation and topic_schema.is_mended(known, staged):
            folder = f"{KEPT}/{output.topic}"
            known = self._known(folder)
        is_same = staged == known
        wanted = known if is_same else self._widened(output, unite(known, staged), staged)
        self._columns[folder] = wanted
        digest = output.digest
        if not is_same and any(wanted.field(each.name).type != each.type for each in staged):
            columns = pa.schema([*wanted, *LINEAGE_FIELDS])
            stage = parts.rewritten(stage, output.topic, columns)
            self._copies.append(stage)
            digest = parts.digest(stage)
            crashpoint("parquet.rewritten")
        return entry_of(output, str(stage).removeprefix(f"{self._root}/"), digest)

    def _known(self, folder: str) -> Any:
        """The columns so far: of a topic, or of those of its kept outputs that were rebuilt and
        that nobody has seen yet.

        Raises:
            SinkConflict, OSError: as `parts.topic_columns`.
        """
        if folder not in self._columns and folder not in self._found:
            place = self._root / folder
            is_kept = folder.startswith(KEPT)
            is_left = is_kept and not self.record.is_rebuilding(place.name)
            is_written = not is_left and parts.has_topic_columns(place)
            is_empty = is_kept and not is_written
            columns = pa.schema([]) if is_empty else parts.topic_columns(place)
            self._found[folder] = columns, is_written
        return self._columns[folder] if folder in self._columns else self._found[folder][0]

    def _is_other(self, output: Output) -> bool:
        """Whether an output that becomes visible has other columns than its topic.

        What is staged has been united with the topic's columns, unless it was rebuilt.
        """
        entry = self._entries[output.output_key]
        if entry.source.startswith(STAGE) and not output.generation:
            return False
        if not self._has(entry.disk):
            return False
        known, own = self._known(entry.topic), parts.own_schema(self._root / entry.disk)
        is_mended = bool(output.generation) and topic_schema.is_mended(known, own)
        return is_mended or any(
            field.name not in known.names
            or not topic_schema.is_within(field.type, known.field(field.name))
            for field in own
        )

    def _unite_anew(self, topic: str) -> None:
        """Plan the columns of a topic as those of all outputs that will stand.

        Raises:
            SinkConflict: files that stay have other types.
            OSError: the disk refused.
        """
        entries = {**self.record.of_topic(topic), **self._entries}
        stand = [e for e in entries.values() if e.topic == topic and e.stands and e.disk]
        stand.sort(key=lambda entry: -entry.generation)
        columns, misfits = parts.united([self._root / entry.disk for entry in stand])
        stay = [f"{self._root}/{stand[number].path}" for number in misfits]
        if stay:
            more = f" and {len(stay) - _LISTED} more" if len(stay) > _LISTED else ""
            raise SinkConflict(
                f"topic {topic!r} cannot show what was rebuilt, and nothing was changed: columns "
                f"of files that stay have other types: {', '.join(stay[:_LISTED])}{more}",
                "retract those versions, or keep their files so that they can be rebuilt as well",
            )
        self._anew.add(topic)
        self._columns[topic] = columns

    def _check_name(self, output: Output) -> None:
        """Check, before an output is kept, that its name is free for when it is shown.

        Raises:
            SinkConflict: another program's file has it.
        """
        entry = self._entries[output.output_key]
        there = self._named(f"{output.topic}/{_slot_of(output)}")
        if there and entry.disk and not output.visible:
            self._adopted(entry, there)

    def _named(self, name: str) -> str:
        """The file or folder of that name which the plan leaves there; empty if there is none."""
        paths = (f"{name}.parquet", name)
        return next((p for p in paths if p not in self._left and self._has(p)), "")

    def _widened(self, output: Output, columns: Any, staged: Any) -> Any:
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
            if is_whole and not parts.are_within_double(self._files(output.topic), field.name):
                continue
            columns = columns.set(number, field.with_type(wide))
        return columns

    def _files(self, topic: str) -> Iterator[Path]:
        """All outputs of a topic, visible or not, published or planned."""
        for folder in (self._root / topic, self._root / KEPT / topic):
            yield from parts.list_outputs(folder)
        for entry in self._entries.values():
            if entry.topic == topic and entry.source:
                yield self._root / entry.source

    def _check_folder(self, output: Output) -> None:
        """Check the topic's folder once for all outputs.

        Raises:
            SinkConflict: in mode error, it has a file that is not an output of ours.
            OSError: it is on another filesystem than the stages, or the disk refused.
        """
        topic, folder = output.topic, self._root / output.topic
        if os.stat(output.stage).st_dev != folder.stat().st_dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), output.stage, None, str(folder))
        is_strict = output.mode == "error"
        ours = {path for path, _ in self.record.places(topic).values()} if is_strict else set()
        for path in sorted(folder.iterdir()) if is_strict else ():
            is_other = f"{topic}/{path.name}" not in ours and not path.name.startswith((".", "_"))
            if is_other and not parts.footer_of(path):
                raise SinkConflict(
                    f"topic {topic!r} is in mode error, and Casparian Flow did not write {path}",
                    "move it elsewhere, then retry the job; or choose another mode: casparian "
                    "topics",
                )
        self._checked.add((topic, output.mode))

    def _fault(self, error: Exception, output: Output) -> JobError:
        """The error to report for one of the disk or Arrow while an output was planned."""
        if output.stage and not os.path.lexists(output.stage):
            return lost(output, "it is gone")
        return (
            refused(error, self._root / output.topic)
            if is_disk_fault(error)
            else lost(output, error)
        )


def refused(error: OSError, place: Path) -> SinkUnavailable:
    """The error to report for one of the disk."""
    if error.errno in _NO_LINKS:
        return SinkUnavailable(
            f"cannot link {error.filename} to {error.filename2}: {error.strerror}",
            "a sink's folder must be on one filesystem that supports hard links",
        )
    return unavailable(error, place)


def _paired(
    arriving: Sequence[Output], leaving: Sequence[tuple[Output, str]]
) -> Iterator[tuple[Output, str]]:
    """Each output that becomes visible, and the name of the one that leaves its slot; else empty.

    Outputs of one version slot are paired first, then those of one location slot, then any.
    """
    names: dict[str, str] = {}
    free = list(leaving)
    slots: list[Callable[[Output], str]] = [
        lambda output: output.version_slot, lambda output: output.location_slot, lambda output: "",
    ]  # fmt: skip
    for slot in slots:
        places: dict[tuple[str, str], list[tuple[Output, str]]] = {}
        for each in free:
            places.setdefault((each[0].topic, slot(each[0])), []).append(each)
        for output in arriving if free else ():
            if output.output_key not in names and (
                same := places.get((output.topic, slot(output)))
            ):
                names[output.output_key] = same.pop(0)[1]
        free = [each for same in places.values() for each in same]
    for output in arriving:
        yield output, names.get(output.output_key, "")


def _slot_of(output: Output) -> str:
    """The name of an output's file, after its slot."""
    slot = output.location_slot if output.mode == "replace" else output.version_slot
    return slot[:KEY_DIGITS]


def _stem(path: str) -> str:
    return Path(path).name.removesuffix(".parquet")


def _foreign(path: Path) -> SinkConflict:
    return SinkConflict(
        f"{path} does not contain the output that its name stands for; it was left untouched",
        "move it elsewhere, then retry the job",
    )
