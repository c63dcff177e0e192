"""The Gatekeeper: reads a plugin's MANIFEST and checks its source against the policy.

It gives early feedback and is no security boundary; the sandbox is. It parses in a subprocess
with tight limits, since a hostile source can crash, fill or stall a parser.
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
"""Twice the child's processor time, for a busy machine."""

log = logging.getLogger(__name__)


class Inspection(msgspec.Struct, frozen=True):
    """Result of checking one source."""

    file_name: str
    manifest: Manifest
    findings: list[Finding]
    """Sorted by line; at most `FINDINGS_LIMIT`."""
    policy: Policy

    @property
    def verdict(self) -> dict[str, Any]:
        """Ruleset, policy and outcome, as values that JSON can hold."""
        return {
            "ruleset": RULESET,
            "allow": sorted(self.policy.allow),
            "forbid": sorted(self.policy.forbid),
            "findings": len(self.findings),
            "passed": not self.findings,
        }

    def require(self) -> None:
        """Raise if there are findings.

        Raises:
            PolicyRefused: the message has a line for each finding.
        """
        if not self.findings:
            return
        count = len(self.findings)
        more = " or more" if count == FINDINGS_LIMIT else ""
        lines = [
            f"{self.file_name} line {finding.line}: [{finding.rule}] {finding.what}; "
            f"{finding.instead}"
            for finding in self.findings
        ]
        entries = dict.fromkeys(finding.entry for finding in self.findings)
        allow = [entry for entry in entries if entry not in self.policy.forbid]
        raise PolicyRefused(
            f"{self.file_name} has {count}{more} mention{'' if count == 1 else 's'} that the "
            "policy forbids:\n" + "\n".join(lines),
            "change these lines"
            + (f", or set [gatekeeper] allow = {json.dumps(allow)}" if allow else ""),
        )


def inspect(source: bytes, file_name: str, policy: Policy) -> Inspection:
    """Read a plugin's MANIFEST and check its source, in a child with limited resources.

    Args:
        source: the file's bytes.
        file_name: its name, as for `manifest.read_manifest`.
        policy: exceptions from the rules, and additional prohibitions.

    Raises:
        PluginError: the source is not a plugin (see `manifest.read_manifest`), or the child could
            not be started or exceeded its limits.
    """
    try:
        answer = _ask(Request(file_name, policy), source)
    except OSError as error:
        raise PluginError(
            f"cannot check {file_name}: no process or temporary file can be created: "
            f"{error.strerror}",
            "free memory or disk space, and try again",
        ) from error
    if answer is None:
        raise PluginError(
            f"checking {file_name} took more than {CPU_SECONDS} s of processor time, "
            f"{WALL_SECONDS:.0f} s in all or {MEMORY_MIB} MiB of memory",
            "try again if the machine is busy; otherwise move data out of the source, and code "
            "into a package",
        )
    if answer.manifest is None:
        raise PluginError(*answer.error or ())
    return Inspection(file_name, answer.manifest, answer.findings, policy)


def _ask(request: Request, source: bytes) -> Answer | None:
    """The child's answer; None if it died, was killed, or wrote anything else."""
    # Files instead of pipes: they cannot block, and RLIMIT_FSIZE bounds the output.
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
            log.debug("the check of %s was stopped by its time limit", request.file_name)
            return None
        log.debug("the check of %s ended with status %d", request.file_name, done.returncode)
        if done.returncode:
            return None
        answered.seek(0)
        try:
            return msgspec.convert(json.loads(answered.read(ANSWER_LIMIT)), Answer)
        except (ValueError, RecursionError):
            log.debug("the check of %s gave no result", request.file_name)
            return None
