"""The Gatekeeper: reads a plugin's MANIFEST and judges its source, in a process of its own.

It is early, friendly policy feedback, and no boundary: what plugins can do is decided by the
sandbox. The child keeps a source that is made to crash, fill or stall a parser away from us.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from typing import Any

import msgspec

from casparian_flow.errors import PluginError, PolicyRefused
from casparian_flow.security import gatekeeper_child
from casparian_flow.security.gatekeeper_child import (
    ANSWER_LIMIT,
    CPU_SECONDS,
    MEMORY_MIB,
    Answer,
    Request,
)
from casparian_flow.security.manifest import Manifest
from casparian_flow.security.rules import FINDINGS_LIMIT, RULESET, Finding, Policy

WALL_SECONDS = 60.0
"""Twice what the child may compute: other processes want the machine too."""

log = logging.getLogger(__name__)


class Inspection(msgspec.Struct, frozen=True):
    """What the Gatekeeper saw in one source."""

    file_name: str
    manifest: Manifest
    findings: list[Finding]
    """By line; `FINDINGS_LIMIT` at most."""
    policy: Policy

    @property
    def verdict(self) -> dict[str, Any]:
        """The rules and the policy it was judged by, and the outcome; fit for JSON."""
        return {
            "ruleset": RULESET,
            "allow": sorted(self.policy.allow),
            "forbid": sorted(self.policy.forbid),
            "findings": len(self.findings),
            "passed": not self.findings,
        }

    def require(self) -> None:
        """Return if nothing was found.

        Raises:
            PolicyRefused: something was; the message has a line for each finding.
        """
        if not self.findings:
            return
        count = len(self.findings)
        more = " or more" if count == FINDINGS_LIMIT else ""
        lines = [
            f"{self.file_name} line {found.line}: [{found.rule}] {found.what}; {found.instead}"
            for found in self.findings
        ]
        entries = dict.fromkeys(found.entry for found in self.findings)
        allow = [entry for entry in entries if entry not in self.policy.forbid]
        raise PolicyRefused(
            f"{self.file_name} has {count}{more} mention{'' if count == 1 else 's'} that the "
            "policy forbids:\n" + "\n".join(lines),
            "mend these lines"
            + (f", or set [gatekeeper] allow = {json.dumps(allow)}" if allow else ""),
        )


def inspect(source: bytes, file_name: str, policy: Policy) -> Inspection:
    """Read and judge a plugin's source, in a child whose time, memory and output are limited.

    Args:
        source: the file's bytes.
        file_name: its name, as for `manifest.read_manifest`.
        policy: what to allow and forbid besides the rules.

    Raises:
        PluginError: it is not a plugin, as `manifest.read_manifest` says, or the child could not
            be started or could not read it within its limits.
    """
    try:
        answer = _ask(Request(file_name, policy), source)
    except OSError as error:
        raise PluginError(
            f"{file_name} was not read: no process or temporary file for it: {error.strerror}",
            "free memory or disk space, and try again",
        ) from error
    if answer is None:
        raise PluginError(
            f"{file_name} could not be read within {CPU_SECONDS} s of processor time, "
            f"{WALL_SECONDS:.0f} s in all and {MEMORY_MIB} MiB of memory",
            "make it shorter: move data out of the source, and code into a package that it "
            "depends on; on a busy machine, try again",
        )
    if answer.manifest is None:
        raise PluginError(*answer.error or ())
    return Inspection(file_name, answer.manifest, answer.findings, policy)


def _ask(request: Request, source: bytes) -> Answer | None:
    """The child's answer; None if it died, was killed, or wrote something else."""
    # Files and no pipes: nothing can fill up or stay open, and the kernel bounds what is written.
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answered:
        asked.write(json.dumps(msgspec.to_builtins(request)).encode() + b"\n" + source)
        asked.seek(0)
        try:
            done = subprocess.run(
                [sys.executable, "-I", gatekeeper_child.__file__],
                stdin=asked,
                stdout=answered,
                stderr=subprocess.DEVNULL,
                env={},
                timeout=WALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.debug("the reader of %s was killed by its time limit", request.file_name)
            return None
        log.debug("the reader of %s ended with status %d", request.file_name, done.returncode)
        if done.returncode:
            return None
        answered.seek(0)
        try:
            return msgspec.convert(json.loads(answered.read(ANSWER_LIMIT)), Answer)
        except (ValueError, RecursionError):
            log.debug("the reader of %s wrote no answer", request.file_name)
            return None
