"""A subprocess with tight resource limits that parses and checks one plugin's source.

The Gatekeeper starts it as `python -I .../gatekeeper_child.py`. Standard input has a `Request` as
one line of JSON, then the source; standard output is an `Answer` in JSON.
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
"""Address space; parsing 1 MiB of source takes at most half of it."""
ANSWER_LIMIT = 4 << 20
"""Bytes. A MANIFEST can be nearly as long as its source, and JSON may escape its characters."""


class Request(msgspec.Struct, frozen=True):
    """What to check, besides the source itself."""

    file_name: str
    policy: Policy


class Answer(msgspec.Struct, frozen=True):
    """The manifest and findings, or why the source is not a plugin."""

    manifest: Manifest | None = None
    findings: list[Finding] = []
    error: tuple[str, str] | None = None
    """Message and hint of a PluginError."""


def main() -> None:
    """Lower the resource limits, then read, check and answer."""
    lower(resource.RLIMIT_CPU, CPU_SECONDS)
    lower(resource.RLIMIT_FSIZE, ANSWER_LIMIT)
    lower(resource.RLIMIT_CORE, 0)
    try:
        lower(resource.RLIMIT_AS, MEMORY_MIB << 20)
    except (OSError, ValueError):
        if sys.platform != "darwin":  # macOS has the limit but cannot set it
            raise
    head, _, source = sys.stdin.buffer.read().partition(b"\n")
    answer = answer_to(msgspec.convert(json.loads(head), Request), source)
    # Not msgspec's JSON: a file name that is not UTF-8 has lone surrogates.
    sys.stdout.buffer.write(json.dumps(msgspec.to_builtins(answer)).encode())


def lower(limit: int, to: int) -> None:
    """Lower the soft and hard limit of a resource; never raises them."""
    _, hard = resource.getrlimit(limit)
    new = to if hard == resource.RLIM_INFINITY else min(to, hard)
    resource.setrlimit(limit, (new, new))


def answer_to(request: Request, source: bytes) -> Answer:
    """Parse once, for both the MANIFEST and the policy."""
    try:
        tree = parse(source, request.file_name)
        manifest = manifest_in(tree, source, request.file_name)
    except PluginError as error:
        return Answer(error=(error.message, error.hint))
    return Answer(manifest, judge(tree, request.policy))


if __name__ == "__main__":
    main()
