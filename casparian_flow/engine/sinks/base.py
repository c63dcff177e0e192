"""What every sink must do, in two halves that meet on disk.

The Worker *stages*: it writes an output to a file under the sink's own stage folder and seals it
(fsync), so that the file can be published after any crash; `stage.py` does that alike for all
sinks. The Committer *publishes*: it makes a sealed output visible, exactly once for its output
key, however often it is asked. tests/sinks/test_contract.py holds every sink to this page.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Protocol, TypeGuard

from casparian_flow import bundled
from casparian_flow.durable import STATE_FOLDER
from casparian_flow.errors import JobError, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, Record, StagedOutput

if TYPE_CHECKING:
    from casparian_flow.engine.sinks.stage import Stage


LINEAGE = ("_cf_file_version_id", "_cf_job_id", "_cf_source_hash", "_cf_plugin_version")
"""Columns on every row, reserved to us: where it came from and who made it."""


KEY_DIGITS = 32
"""Digits of an output key that tell it from every other; they name its Parquet file."""


class Lineage(Record, frozen=True):
    """The values of the lineage columns of one attempt's rows, in their order."""

    file_version_id: int
    job_id: int
    source_hash: str
    plugin_version: str


class Claim(Record, frozen=True):
    """What the ledger says a sink holds."""

    topic: str
    output_key: str
    job_id: int
    target: str
    rows: int
    digest: str


class Found(Record, frozen=True):
    """An output that a sink holds, shown or not, as the sink's own record of it says."""

    topic: str
    output_key: str
    target: str
    rows: int
    digest: str
    job_id: int
    file_version_id: int
    content_hash: str = ""
    plugin_version: str = ""
    source: str = ""
    """Name of the source root; empty, as what follows, where an earlier release published it."""
    path: bytes = b""
    ordinal: int = 0
    size_bytes: int = 0
    artifact_hash: str = ""
    plugin: str = ""
    uri: str = ""
    mode: str = "append"
    slot: str = ""
    retracted: bool = False


def facts_of(footer: Mapping[bytes, bytes]) -> dict[str, str]:
    """The facts that `stage.py` wrote into a file's footer, without the prefix of their names."""
    return {
        name.decode().removeprefix("casparian."): value.decode()
        for name, value in footer.items()
        if name.startswith(b"casparian.")
    }


def own_topic(topic: str, facts: Mapping[str, str]) -> str:
    """What to type so that files of another kind than a topic's get a topic of their own.

    Args:
        topic: that of the output.
        facts: those of the output, as `OutputPlan.facts` has them; without a path there is nothing
            to say.
    """
    name = PurePath(os.fsdecode(bytes.fromhex(facts.get("path", "")))).name
    if not name.isprintable() or "plugin" not in facts:
        return ""
    ends = PurePath(name).suffixes
    end = "".join(ends[-2:] if ends[-1:] == [".gz"] else ends[-1:])
    first = re.match(r"[A-Za-z]{2,}", name.removesuffix(end))
    # What begins with a digit or one letter says too little: the pattern would fit other families.
    begin = first[0] if first else name.removesuffix(end)
    pattern = f"{begin}*{end}" if first else re.sub(r"[\[\]{}()!?*\\]", "?", name)
    own = re.sub(r"[^a-z0-9]+", "_", begin.lower()).strip("_") or "other"
    own = f"{own}_2" if own in (topic, facts["plugin"]) else own
    main, *others = facts.get("topics", topic).split("/")
    topics = [own, *(f"{own}_{each.removeprefix(main).lstrip('_')}" for each in others)]
    said = " ".join(f"--topic {shlex.quote(each)}" for each in topics)
    return (
        f"casparian publish {bundled.argument(facts['plugin'])} --name {own} --pattern "
        f"{shlex.quote(pattern)} {said}"
    )


def otherwise(settles: str, column: str) -> str:
    """What ends the message of an output that is refused for the type of a column.

    Args:
        settles: what `own_topic` said, or nothing.
        column: its name.
    """
    if not settles:
        return ""
    same = "let the plugin publish the column as text"
    if settles.startswith("casparian publish json_records ") and not re.search("[:,]", column):
        option = shlex.quote(f"types={column}:text")
        same = f"give them all such a topic, with a --pattern of all of them and --option {option}"
    return (
        f". Files of another kind get a topic of their own: {settles}. Where they are of one kind, "
        f"{same}"
    )


def found(
    target: str, rows: int, digest: str, footer: Mapping[str, str], *, retracted: bool = False
) -> Found:
    """An output, from the facts that `stage.py` wrote down about it.

    Args:
        footer: as `facts_of` gives them.
        retracted: whether it is; the facts do not tell.

    Raises:
        ValueError, KeyError: these are no facts of ours.
    """
    return Found(
        topic=footer["topic"],
        output_key=footer["output_key"],
        target=target,
        rows=rows,
        digest=digest,
        job_id=int(footer["job_id"]),
        file_version_id=int(footer["file_version_id"]),
        content_hash=footer.get("source_hash", ""),
        plugin_version=footer.get("plugin_version", ""),
        source=footer.get("source", ""),
        path=bytes.fromhex(footer.get("path", "")),
        ordinal=int(footer.get("ordinal", 0)),
        size_bytes=int(footer.get("size_bytes", 0)),
        artifact_hash=footer.get("artifact_hash", ""),
        plugin=footer.get("plugin", ""),
        uri=footer.get("uri", ""),
        mode=footer.get("mode", "append"),
        slot=footer.get("slot", ""),
        retracted=retracted,
    )


class Sink(Protocol):
    """One place where topics go.

    An output is *shown*, or no reader is to see it: it is *replaced* (mode `replace`: a greater
    one of its slot was published) or *retracted* (a person took its rows back). In a slot a
    retracted output keeps its place: what it has replaced does not appear again.
    """

    stage_folder: Path
    """On the target's filesystem, inside a `.casparian` folder."""

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """Start an output.

        Args:
            plan: topic, sink, mode and output key.
            lineage: the values of the lineage columns.
            attempt: a name no other attempt has; the staged file's name begins with it.

        Raises:
            OutputRefused: the topic's name or mode is not one this sink has.
            SinkUnavailable: the folder cannot be created or written.
        """

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """Make sealed outputs visible and durable; idempotent per output key.

        An output whose key is published already is adopted, not written again, and stays retracted
        where it is. What is published no longer needs its staged file, which is removed. The
        outcomes are in the order of `outputs`. Of one job either all that are not adopted are
        published or none, and a failed job changes nothing and does not stop the others:
        SinkConflict (the target is not ours), OutputRefused (this sink cannot hold the rows),
        SinkUnavailable (full, locked, read-only), JobError itself (the staged file is gone or
        damaged).

        Mode `replace`: among the outputs of one slot that were published in this mode only the
        one with the greatest (ordinal, job id) is visible, and takes the place of the others in
        the same instant. One that is not the greatest is published, and nobody sees its rows.

        Mode `error`: SinkConflict where the topic's place holds what is not ours.
        """

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """Compare claims with what is there; one sentence for each claim that does not hold."""

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """What is there of ours under other output keys, and what is retracted under any key: an
        older ledger does not know. What cannot be read is passed over: publishing to its name will
        say so.

        Args:
            known: the first `KEY_DIGITS` digits of each output key that is no news.

        Raises:
            SinkUnavailable: the sink is there and cannot be looked at.
        """

    def withdraw(self, claim: Claim) -> None:
        """Make room for an output to be published again: nothing of it is left afterwards.

        Raises:
            SinkConflict: what stands in its place is not whole, and a person must move it away.
            SinkUnavailable: full, locked, read-only.
        """

    def retract(self, claim: Claim) -> None:
        """Take an output's rows out of every reader's sight and keep them; idempotent.

        What is replaced already, or is not there, is left as it is: its rows are in nobody's sight.

        Raises:
            SinkConflict: what stands in its place is not this output, or not whole.
            SinkUnavailable: full, locked, read-only.
        """

    def reinstate(self, claim: Claim) -> None:
        """Undo `retract`: the same rows are visible again; idempotent.

        Where a greater output of its slot was published since, it is replaced from now on.

        Raises:
            SinkConflict: what was kept is gone or altered, or its place is taken.
            SinkUnavailable: full, locked, read-only.
        """


_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space; the jobs go on by themselves"),
    errno.EDQUOT: ("the disk quota is used up", "free some space; the jobs go on by themselves"),
    errno.EROFS: ("the filesystem is read-only", "mount it writable"),
    errno.EACCES: ("permission denied", "give the user that runs casparian the right to write"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n"),
}


def unavailable(error: OSError, place: Path) -> SinkUnavailable:
    """The error of a disk that refused, in words."""
    words, hint = _WORDS.get(error.errno or 0, (error.strerror or str(error), ""))
    return SinkUnavailable(f"cannot write {place}: {words}", hint)


def is_disk_fault(error: Exception) -> TypeGuard[OSError]:
    """Whether the disk refused: Arrow raises OSError for other things too, without a number."""
    return isinstance(error, OSError) and error.errno is not None


def lost(output: StagedOutput, reason: object) -> JobError:
    """The error of a sealed file that is gone or damaged: only another attempt can help."""
    return JobError(
        f"the staged file {output.stage} of topic {output.topic!r} cannot be read: {reason}",
        "retry the job: its plugin will write the output again",
    )


# What a Parquet sink holds, by name alone: nothing is opened, so that pyarrow is not imported.
#
# `standing.py` says which names there are.


def hidden_folder(root: Path, topic: str) -> Path:
    """Where a topic's retracted outputs are."""
    return root / STATE_FOLDER / "hidden" / topic


def list_outputs(folder: Path) -> Iterator[Path]:
    """What may be outputs in a topic's folder: files, and folders of parts.

    Raises:
        OSError: the folder is there and cannot be looked at.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = entry.name.removesuffix(".parquet")
        if len(name) == KEY_DIGITS and not name.startswith((".", "_")):
            yield entry


def unknown_outputs(root: Path, known: Container[str]) -> Iterator[tuple[Path, bool]]:
    """What may be outputs of the whole sink and be news, and whether it is hidden.

    What is named after a known output key is none; a name of mode replace is a slot's, and says
    nothing about what is there.

    Raises:
        OSError: a folder is there and cannot be looked at.
    """
    kept = hidden_folder(root, "")
    for folder in sorted([*root.glob("[!._]*/"), *kept.glob("*/")]):
        hidden = folder.parent == kept
        for path in list_outputs(folder):
            if hidden or path.name.removesuffix(".parquet") not in known:
                yield path, hidden
