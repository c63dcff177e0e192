"""An environment without the keys, settings and daemons of the person who runs a proof."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

OF_A_PERSON = {
    "CASPARIAN_CONFIG", "CASPARIAN_CRASH_AT", "CASPARIAN_CRASH_LOG", "AZURE_TENANT_ID",
    "AZURE_CLIENT_ID", "CASPARIAN_MSSQL", "CASPARIAN_MSSQL_PASSWORD",
}  # fmt: skip
"""Variables that must not reach a command that is tried on a scratch tree."""


@contextlib.contextmanager
def private(person: Path, cache: Path | None = None) -> Iterator[dict[str, str]]:
    """An environment for the commands of a proof, for as long as the block runs.

    Args:
        person: takes keys.
        cache: takes plugins' environments; None: those of this person are used.
    """
    folders = {"XDG_CONFIG_HOME": str(person.absolute())}
    if cache:
        folders["XDG_CACHE_HOME"] = str(cache.absolute())
    ours = {name: value for name, value in os.environ.items() if name not in OF_A_PERSON}
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as runtime:
        # Not in a folder of the proof's own: a socket's path must be short.
        yield ours | folders | {"XDG_RUNTIME_DIR": runtime}


@contextlib.contextmanager
def private_process(person: Path, cache: Path | None = None) -> Iterator[None]:
    """Have this process, and what it starts, in the environment of `private`."""
    before = dict(os.environ)
    with private(person, cache) as environment:
        _become(environment)
        try:
            yield
        finally:
            _become(before)


def _become(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
