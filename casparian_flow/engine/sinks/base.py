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
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from casparian_flow import bundled
from casparian_flow.errors import JobError, SinkUnavailable
from casparian_flow.protocol import Output

LINEAGE = ("_cf_file_version_id", "_cf_job_id", "_cf_source_hash", "_cf_plugin_version")
"""Reserved columns of every row: the row's file version, job and plugin version."""


KEY_DIGITS = 32
"""The first digits of an output key that suffice to identify it; they name its Parquet file."""


def facts_of(footer: Mapping[bytes, bytes]) -> dict[str, str]:
    """The facts that `stage.py` wrote into a file's footer, by name without the prefix."""
    return {
        name.decode().removeprefix("casparian."): value.decode()
        for name, value in footer.items()
        if name.startswith(b"casparian.")
    }


def own_topic(output: Output) -> str:
    """The command that gives files of another kind than a topic's a topic of their own.

    Returns:
        an empty string if the output names no plugin or no printable file name.
    """
    topic, name = output.topic, PurePath(os.fsdecode(output.path)).name
    if not name.isprintable() or not output.plugin:
        return ""
    ends = PurePath(name).suffixes
    end = "".join(ends[-2:] if ends[-1:] == [".gz"] else ends[-1:])
    first = re.match(r"[A-Za-z]{2,}", name.removesuffix(end))
    # A name that begins with a digit or one letter gives a pattern that fits other files too.
    begin = first[0] if first else name.removesuffix(end)
    pattern = f"{begin}*{end}" if first else re.sub(r"[\[\]{}()!?*\\]", "?", name)
    own = re.sub(r"[^a-z0-9]+", "_", begin.lower()).strip("_") or "other"
    own = f"{own}_2" if own in (topic, output.plugin) else own
    main, *others = (output.topics or topic).split("/")
    topics = [own, *(f"{own}_{other.removeprefix(main).lstrip('_')}" for other in others)]
    options = " ".join(f"--topic {shlex.quote(name)}" for name in topics)
    return (
        f"casparian publish {bundled.argument(output.plugin)} --name {own} --pattern "
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
        f"are of the same kind, {same}. If this version of the plugin mends the column: casparian "
        "rebuild PLUGIN"
    )


def lineage_of(output: Output) -> tuple[int, int, str, str]:
    """The values of an output's rows in the columns of `LINEAGE`."""
    return output.version_id, output.job_id, output.content_hash, output.plugin_version


def facts_in(output: Output) -> dict[str, str]:
    """The facts of an output that its sink keeps, in footers and in its record."""
    rebuilt = {"generation": str(output.generation)} if output.generation else {}
    return {
        "topic": output.topic, "output_key": output.output_key, "mode": output.mode,
        "ordinal": str(output.ordinal), "source": output.source, "path": output.path.hex(),
        "size_bytes": str(output.file_bytes), "artifact_hash": output.artifact_hash,
        "plugin": output.plugin, "topics": output.topics, "uri": output.uri,
        "file_version_id": str(output.version_id), "job_id": str(output.job_id),
        "source_hash": output.content_hash, "plugin_version": output.plugin_version, **rebuilt,
    }  # fmt: skip


def output_of(location: str, facts: Mapping[str, str], **found: Any) -> Output:
    """The output that `facts_in` describes.

    Args:
        location: the sink that has it.
        found: what the sink says of it: rows, digest, state, target and times.

    Raises:
        ValueError, KeyError: the facts are not those of an output of Casparian Flow. Facts that
            earlier releases did not write are empty.
    """
    return Output(
        output_key=facts["output_key"],
        topic=facts["topic"],
        uri=facts.get("uri", ""),
        location=location,
        mode=facts.get("mode", "append"),
        source=facts.get("source", ""),
        path=bytes.fromhex(facts.get("path", "")),
        ordinal=int(facts.get("ordinal", 0)),
        content_hash=facts.get("source_hash", ""),
        file_bytes=int(facts.get("size_bytes", 0)),
        plugin=facts.get("plugin", ""),
        plugin_version=facts.get("plugin_version", ""),
        artifact_hash=facts.get("artifact_hash", ""),
        version_id=int(facts["file_version_id"]),
        job_id=int(facts["job_id"]),
        topics=facts.get("topics", ""),
        generation=int(facts.get("generation", 0)),
        **found,
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


def lost(output: Output, reason: object) -> JobError:
    """The error to report for a sealed file that is gone or damaged; the job must run again."""
    return JobError(
        f"the staged file {output.stage} of topic {output.topic!r} cannot be read: {reason}",
        "casparian jobs retry ID   (the plugin then writes the output again)",
    )
