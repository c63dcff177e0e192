"""The Gatekeeper's child: a process of little means that parses and judges one plugin's source.

Started by the gatekeeper as `python -I .../gatekeeper_child.py`. The standard input is a line of
JSON, a `Request`, and then the source; the standard output becomes an `Answer` in JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec

from casparian_flow.errors import PluginError
from casparian_flow.security.manifest import Manifest, manifest_in, parse
from casparian_flow.security.rules import Finding, Policy, judge

CPU_SECONDS = 30
MEMORY_MIB = 2048
"""Address space; a mebibyte of source takes half of it at the worst."""
ANSWER_LIMIT = 4 << 20
"""Bytes. A MANIFEST may be nearly as long as its source, whose characters JSON may escape."""


class Request(msgspec.Struct, frozen=True):
    """What is to be judged, besides the source itself."""

    file_name: str
    policy: Policy


class Answer(msgspec.Struct, frozen=True):
    """What was read, or why it is no plugin."""

    manifest: Manifest | None = None
    findings: list[Finding] = []
    error: tuple[str, str] | None = None
    """Message and hint of a PluginError."""


def main() -> None:
    """Give up what a parser does not need, then read, judge and answer."""
    lower(resource.RLIMIT_CPU, CPU_SECONDS)
    lower(resource.RLIMIT_FSIZE, ANSWER_LIMIT)
    lower(resource.RLIMIT_CORE, 0)
    try:
        lower(resource.RLIMIT_AS, MEMORY_MIB << 20)
    except (OSError, ValueError):
        if sys.platform != "darwin":  # which knows the limit and refuses to set it
            raise
    head, _, source = sys.stdin.buffer.read().partition(b"\n")
    answer = answer_to(msgspec.convert(json.loads(head), Request), source)
    # Not msgspec's JSON: a file's name may have lone surrogates, for bytes that are not UTF-8.
    sys.stdout.buffer.write(json.dumps(msgspec.to_builtins(answer)).encode())


def lower(limit: int, to: int) -> None:
    """Lower a resource limit for good; one that is lower already stays."""
    _, hard = resource.getrlimit(limit)
    new = to if hard == resource.RLIM_INFINITY else min(to, hard)
    resource.setrlimit(limit, (new, new))


def answer_to(request: Request, source: bytes) -> Answer:
    """One parse for both: the MANIFEST, and what the policy forbids."""
    try:
        tree = parse(source, request.file_name)
        manifest = manifest_in(tree, source, request.file_name)
    except PluginError as error:
        return Answer(error=(error.message, error.hint))
    return Answer(manifest, judge(tree, request.policy))


if __name__ == "__main__":
    main()
