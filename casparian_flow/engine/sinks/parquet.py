"""The Parquet sink: `<root>/<topic>/<output key>.parquet`, one file an output.

Readers take `<root>/<topic>/*.parquet`. A file appears by `link`, which shows the whole file or
none and refuses a name that exists (a rename would replace what is there).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    Claim,
    Found,
    Lineage,
    facts_of,
    found,
    is_disk_fault,
    lost,
    unavailable,
)
from casparian_flow.engine.sinks.stage import OUTPUT_KEY, Stage
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
        return Stage(self.stage_folder, plan, lineage, attempt)

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. Each topic's folder is made durable once for all its outputs."""
        outcomes = [self._show(output) for output in outputs]
        folders = {Path(o.target).parent for o in outcomes if isinstance(o, Published)}
        failed = {folder: fault for folder in folders if (fault := _sync(folder))}
        for number, (output, outcome) in enumerate(zip(outputs, outcomes, strict=True)):
            if isinstance(outcome, Published):
                if fault := failed.get(Path(outcome.target).parent):
                    outcomes[number] = fault
                else:
                    with contextlib.suppress(OSError):
                        Path(output.stage).unlink()
                    crashpoint("parquet.unstaged")
        return outcomes

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """See `Sink.check`. Reads every byte of every claimed file."""
        return [f"{claim.target}: {fault}" for claim in claims if (fault := _fault(claim))]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. Names begin with the output key: a file is opened if it is new."""
        try:
            for file in sorted(self.root.glob("*/*.parquet")):
                if len(file.stem) == KEY_DIGITS and file.stem not in known:
                    yield from _read(file)
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

    def _show(self, output: StagedOutput) -> Published | JobError:
        """Give the staged file its name among the topic's files, or adopt the one that has it."""
        target = self.root / output.topic / f"{output.output_key[:KEY_DIGITS]}.parquet"
        try:
            atomic.own(self.root, glob.escape(output.topic))
            crashpoint("parquet.owned")
            atomic.make_folder(target.parent)
            if (size := os.stat(output.stage).st_size) != output.size_bytes:
                return lost(output, f"it has {size} bytes, not {output.size_bytes}")
            os.link(output.stage, target)
            crashpoint("parquet.linked")
        except OSError as error:
            if os.path.lexists(target):
                return _adopt(target, output)
            if not os.path.lexists(output.stage):
                return lost(output, "it is gone")
            if error.errno in _NO_LINKS:
                return SinkUnavailable(
                    f"cannot link {output.stage} to {target}: {error.strerror}",
                    "a sink's folder must lie on one filesystem, one that has hard links",
                )
            return unavailable(error, target)
        return Published(target=str(target), rows=output.rows, digest=output.digest, adopted=False)


def _sync(folder: Path) -> SinkUnavailable | None:
    try:
        atomic.fsync_path(folder)
    except OSError as error:
        return unavailable(error, folder)
    crashpoint("parquet.synced")
    return None


def _adopt(target: Path, output: StagedOutput) -> Published | JobError:
    """Take what is there for the output, if its footer says it is."""
    try:
        with target.open("rb") as file:
            if _holds(file, output.output_key, output.rows):
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return Published(target=str(target), rows=output.rows, digest=digest, adopted=True)
    except (FileNotFoundError, IsADirectoryError):
        pass  # a broken symlink, a folder: there, and not ours
    except OSError as error:
        return unavailable(error, target)
    return SinkConflict(
        f"{target} is not the output of this job; it was left untouched",
        "move it elsewhere, then retry the job",
    )


def _read(file: Path) -> Iterator[Found]:
    """The output that a file says it is, if its name says so too."""
    with contextlib.suppress(ValueError, KeyError, pa.ArrowException, FileNotFoundError):
        with file.open("rb") as opened:
            footer = pq.read_metadata(opened)
            facts = facts_of(footer.metadata or {})
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        output = found(str(file), footer.num_rows, digest, facts)
        if output.output_key.startswith(file.stem) and output.topic == file.parent.name:
            yield output


def _holds(file: BinaryIO, output_key: str, rows: int) -> bool:
    """Whether this is a Parquet file of ours, for that output and with as many rows."""
    try:
        footer = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise
        return False
    keys = footer.metadata or {}
    return bool(keys.get(OUTPUT_KEY) == output_key.encode() and footer.num_rows == rows)


def _fault(claim: Claim) -> str:
    """What is wrong with a claimed file; empty where nothing is."""
    try:
        with Path(claim.target).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != claim.digest:
                return "its bytes have changed since it was published"
            file.seek(0)
            if not _holds(file, claim.output_key, claim.rows):
                return f"it is not the output of job {claim.job_id} with {claim.rows} rows"
    except FileNotFoundError:
        return "the file is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return ""
