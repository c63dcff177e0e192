"""What all sinks share: a Worker stages outputs, the Committer publishes them.

To *stage* is to write an output to a Parquet file in the sink's stage folder and to seal it
(fsync), so that it can be published after any crash; `stage.py` does this for all sinks. To
*publish* is to make a sealed output visible, exactly once for its output key, however often it is
repeated.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TypeGuard

from casparian_flow import bundled
from casparian_flow.durable import STATE_FOLDER
from casparian_flow.errors import JobError, SinkUnavailable
from casparian_flow.protocol import Record, StagedOutput

LINEAGE = ("_cf_file_version_id", "_cf_job_id", "_cf_source_hash", "_cf_plugin_version")
"""Reserved columns of every row: the row's file version, job and plugin version."""


KEY_DIGITS = 32
"""The first digits of an output key that suffice to identify it; they name its Parquet file."""


class Lineage(Record, frozen=True):
    """The values of the lineage columns of one attempt's rows, in the order of `LINEAGE`."""

    file_version_id: int
    job_id: int
    source_hash: str
    plugin_version: str


class Claim(Record, frozen=True):
    """An output that a sink should hold, according to the ledger."""

    topic: str
    output_key: str
    job_id: int
    target: str
    rows: int
    digest: str


class Found(Record, frozen=True):
    """An output that a sink holds, shown or not, according to the sink's own record."""

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
    """Name of the source root. This and the later fields are empty for outputs of releases that
    did not record them."""
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
    """The facts that `stage.py` wrote into a file's footer, by name without the prefix."""
    return {
        name.decode().removeprefix("casparian."): value.decode()
        for name, value in footer.items()
        if name.startswith(b"casparian.")
    }


def own_topic(topic: str, facts: Mapping[str, str]) -> str:
    """The command that gives files of another kind than a topic's a topic of their own.

    Args:
        topic: the output's topic.
        facts: the output's `OutputPlan.facts`.

    Returns:
        an empty string if the facts name no plugin or no printable file name.
    """
    name = PurePath(os.fsdecode(bytes.fromhex(facts.get("path", "")))).name
    if not name.isprintable() or "plugin" not in facts:
        return ""
    ends = PurePath(name).suffixes
    end = "".join(ends[-2:] if ends[-1:] == [".gz"] else ends[-1:])
    first = re.match(r"[A-Za-z]{2,}", name.removesuffix(end))
    # A name that begins with a digit or one letter gives a pattern that fits other files too.
    begin = first[0] if first else name.removesuffix(end)
    pattern = f"{begin}*{end}" if first else re.sub(r"[\[\]{}()!?*\\]", "?", name)
    own = re.sub(r"[^a-z0-9]+", "_", begin.lower()).strip("_") or "other"
    own = f"{own}_2" if own in (topic, facts["plugin"]) else own
    main, *others = facts.get("topics", topic).split("/")
    topics = [own, *(f"{own}_{other.removeprefix(main).lstrip('_')}" for other in others)]
    options = " ".join(f"--topic {shlex.quote(name)}" for name in topics)
    return (
        f"casparian publish {bundled.argument(facts['plugin'])} --name {own} --pattern "
        f"{shlex.quote(pattern)} {options}"
    )


def otherwise(settles: str, column: str) -> str:
    """The end of the message that refuses an output because of a column's type.

    Args:
        settles: what `own_topic` returned.
        column: the column's name.
    """
    if not settles:
        return ""
    same = "let the plugin publish the column as text"
    if settles.startswith("casparian publish json_records ") and not re.search("[:,]", column):
        option = shlex.quote(f"types={column}:text")
        same = (
            "publish them all to such a topic, with a --pattern that matches all of them "
            f"and --option {option}"
        )
    return (
        f". If the files are of another kind, give them their own topic: {settles}. If they "
        f"are of the same kind, {same}"
    )


def found(
    target: str, rows: int, digest: str, footer: Mapping[str, str], *, retracted: bool = False
) -> Found:
    """Build the record of an output from the facts that `stage.py` wrote.

    Args:
        footer: the facts, as `facts_of` returns them.
        retracted: whether the output is retracted; the facts do not say.

    Raises:
        ValueError, KeyError: the facts are not those of an output of Casparian Flow.
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


_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space; the jobs then continue by themselves"),
    errno.EDQUOT: (
        "the disk quota is used up",
        "free some space; the jobs then continue by themselves",
    ),
    errno.EROFS: ("the filesystem is read-only", "mount it read-write"),
    errno.EACCES: ("permission denied", "give the user that runs casparian write permission"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n"),
}


def unavailable(error: OSError, place: Path) -> SinkUnavailable:
    """The error to report for an OSError of the disk."""
    reason, hint = _DISK_ERRORS.get(error.errno or 0, (error.strerror or str(error), ""))
    return SinkUnavailable(f"cannot write {place}: {reason}", hint)


def is_disk_fault(error: Exception) -> TypeGuard[OSError]:
    """Whether an error came from the disk. Arrow also raises OSError, but without an errno."""
    return isinstance(error, OSError) and error.errno is not None


def lost(output: StagedOutput, reason: object) -> JobError:
    """The error to report for a sealed file that is gone or damaged; the job must run again."""
    return JobError(
        f"the staged file {output.stage} of topic {output.topic!r} cannot be read: {reason}",
        "casparian jobs retry ID   (the plugin then writes the output again)",
    )


# Names in a Parquet sink. No file is opened, so that pyarrow is not imported.


def hidden_folder(root: Path, topic: str) -> Path:
    """The folder of a topic's retracted outputs."""
    return root / STATE_FOLDER / "hidden" / topic


def list_outputs(folder: Path) -> Iterator[Path]:
    """The files, and folders of parts, in a topic's folder that are named like outputs.

    Raises:
        OSError: the folder exists and cannot be read.
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
    """The sink's outputs that the ledger may not know, by name, and whether each is hidden.

    A file of mode `replace` is named after its slot, so it is always listed.

    Raises:
        OSError: a folder exists and cannot be read.
    """
    kept = hidden_folder(root, "")
    for folder in sorted([*root.glob("[!._]*/"), *kept.glob("*/")]):
        hidden = folder.parent == kept
        for path in list_outputs(folder):
            if hidden or path.name.removesuffix(".parquet") not in known:
                yield path, hidden
