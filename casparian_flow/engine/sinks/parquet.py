"""The Parquet sink: `<root>/<topic>/<output key>.parquet`, one file an output.

A large output is a folder of files, `<root>/<topic>/<output key>/part-00000.parquet` and so on. A
file appears by `link`, which shows the whole file or none and refuses a name that exists (a rename
would replace what is there); a folder by one `rename`, which refuses a folder that is not empty.
Both happen under the sink's lock, so that nobody of ours is between a look and what follows.

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
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import parts, topic_folder
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    Claim,
    Found,
    Lineage,
    found,
    is_disk_fault,
    lost,
    unavailable,
)
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.engine.sinks.topic_schema import LINEAGE_FIELDS, own_columns, unite
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, StagedOutput

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}


class ParquetSink:
    """A folder of Parquet files.

    Args:
        root: the folder; created with the first output.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stage_folder = root / atomic.STATE_FOLDER / "stage"

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`."""
        if plan.mode in ("replace", "error"):
            raise OutputRefused(
                f"topic {plan.topic!r}: Parquet has no mode {plan.mode!r}",
                f"casparian topics set PLUGIN {plan.topic} {plan.uri} --mode append",
            )

        def united(columns: Any) -> Any:
            return unite(topic_folder.columns(self.root / plan.topic), columns)

        return Stage(
            self.stage_folder, plan, lineage, attempt, unite=united, split_bytes=plan.split_bytes
        )

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. Each topic's folder is made durable once for all its outputs."""
        try:
            for topic in dict.fromkeys(output.topic for output in outputs):
                atomic.own(self.root, glob.escape(topic))
                crashpoint("parquet.owned")
            with atomic.exclusive(self.root / atomic.STATE_FOLDER / "parquet.lock"):
                outcomes = [self._publish(output) for output in outputs]
        except OSError as error:
            return [unavailable(error, self.root)] * len(outputs)
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
        return [f"{claim.target}: {fault}" for claim in claims if (fault := _fault(claim))]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. Names begin with the output key: a file is opened if it is new."""
        try:
            for folder in sorted(self.root.glob("[!._]*/")):
                for path in topic_folder.outputs(folder):
                    if path.name[:KEY_DIGITS] not in known:
                        yield from _read(path)
        except OSError as error:
            raise unavailable(error, self.root) from error

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. We remove no file: what is there may be a person's work."""
        if os.path.lexists(claim.target):
            raise SinkConflict(
                f"{claim.target} is there, and was altered", "move it elsewhere, then restore again"
            )

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`."""
        raise SinkConflict(f"{claim.target}: Parquet files cannot be retracted")

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        raise SinkConflict(f"{claim.target}: Parquet files cannot be reinstated")

    def _publish(self, output: StagedOutput) -> Published | JobError:
        """Show an output, or adopt what stands under its key; the caller holds the lock."""
        name = self.root / output.topic / output.output_key[:KEY_DIGITS]
        stage = Path(output.stage)
        try:
            atomic.make_folder(name.parent)
            for target in (name.with_suffix(".parquet"), name):
                if os.path.lexists(target):
                    return _adopt(target, output)
            return self._show(output, stage, name)
        except JobError as error:
            return error
        except (OSError, pa.ArrowException, IndexError) as error:
            if not os.path.lexists(stage):
                return lost(output, "it is gone")
            if not is_disk_fault(error):
                return lost(output, error)
            if error.errno in _NO_LINKS:
                return SinkUnavailable(
                    f"cannot link {stage} to {name.parent}: {error.strerror}",
                    "a sink's folder must lie on one filesystem, one that has hard links",
                )
            return unavailable(error, name)

    def _show(self, output: StagedOutput, stage: Path, name: Path) -> Published:
        """Give what was staged its name among the topic's outputs."""
        if (size := parts.size(stage)) != output.size_bytes:
            raise lost(output, f"it has {size} bytes, not {output.size_bytes}")
        shown, digest = self._fitting(output, stage, name.parent), output.digest
        if shown != stage:
            digest = parts.digest(shown)
        if shown.is_dir():
            target = name
            shown.rename(target)
            crashpoint("parquet.renamed")
        else:
            target = name.with_suffix(".parquet")
            os.link(shown, target)
            crashpoint("parquet.linked")
        if shown != stage:
            atomic.remove(shown)
        return Published(target=str(target), rows=output.rows, digest=digest, adopted=False)

    def _fitting(self, output: StagedOutput, stage: Path, folder: Path) -> Path:
        """What was staged, or a copy with the columns that the topic has by now; from here on the
        topic has those of this output too.

        Raises:
            OutputRefused: its values are not exactly ones of the topic's columns.
            SinkConflict: what tells the topic's columns is not ours.
            OSError: the disk refused.
            pa.ArrowException, IndexError: what was staged is damaged.
        """
        staged = own_columns(pq.read_schema(parts.files(stage)[0]))
        known = topic_folder.columns(folder)
        wanted = unite(known, staged)
        if any(wanted.field(field.name).type != field.type for field in staged):
            columns = pa.schema([*wanted, *LINEAGE_FIELDS])
            stage = parts.rewritten(stage, output.topic, columns)
            crashpoint("parquet.rewritten")
        if not wanted.equals(known):
            topic_folder.set_columns(folder, wanted)
        return stage


def _sync(folder: Path) -> SinkUnavailable | None:
    try:
        atomic.fsync_path(folder)
    except OSError as error:
        return unavailable(error, folder)
    crashpoint("parquet.synced")
    return None


def _adopt(target: Path, output: StagedOutput) -> Published:
    """Take what is there for the output, if its footer says it is.

    Raises:
        SinkConflict: it does not.
        SinkUnavailable: the disk refused to read it.
    """
    try:
        if _holds(target, output.output_key, output.rows):
            digest = parts.digest(target)
            return Published(target=str(target), rows=output.rows, digest=digest, adopted=True)
    except (FileNotFoundError, IsADirectoryError):
        pass  # a broken symlink, a folder in a folder: there, and not ours
    except OSError as error:
        raise unavailable(error, target) from error
    raise SinkConflict(
        f"{target} is not the output of this job; it was left untouched",
        "move it elsewhere, then retry the job",
    )


def _read(path: Path) -> Iterator[Found]:
    """The output that a file or a folder says it is, if its name says so too."""
    passed_over = (ValueError, KeyError, pa.ArrowException, FileNotFoundError, IsADirectoryError)
    with contextlib.suppress(*passed_over):
        told = parts.told(path)
        output = found(str(path), told.rows, parts.digest(path), told.facts)
        names = output.topic, output.output_key[:KEY_DIGITS]
        if names == (path.parent.name, path.name[:KEY_DIGITS]):
            yield output


def _holds(path: Path, output_key: str, rows: int) -> bool:
    """Whether this is Parquet of ours, for that output and with as many rows."""
    try:
        told = parts.told(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise
        return False
    return told.facts.get("output_key") == output_key and told.rows == rows


def _fault(claim: Claim) -> str:
    """What is wrong with a claimed output; empty where nothing is."""
    path = Path(claim.target)
    try:
        if parts.digest(path) != claim.digest:
            return "its bytes have changed since it was published"
        if not _holds(path, claim.output_key, claim.rows):
            return f"it is not the output of job {claim.job_id} with {claim.rows} rows"
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return ""
