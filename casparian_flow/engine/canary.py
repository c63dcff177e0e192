"""Test the sandbox before a Worker takes jobs: a real guest tries to break out.

A kernel's version says what it should enforce; the canary tests what it does. No job runs if the
guest succeeds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from casparian_flow.config import GuestSettings
from casparian_flow.durable import exclusive, make_private
from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.environments import bundle
from casparian_flow.errors import JobError, PluginFailed, SandboxUnavailable, Unavailable
from casparian_flow.protocol import Artifact
from casparian_flow.trees import clear_away

log = logging.getLogger(__name__)

HINT = (
    'use Linux 5.13 or newer on x86-64 with Landlock, or set [guest] sandbox = "best-effort" '
    "(missing layers then do not confine plugins; docs/security.md)"
)

ATTEMPTS = """
import os, socket

def read_outside(): open(SECRET).read()
def write_outside(): open(SECRET, "a").close()
def change_a_mode(): os.chmod(SECRET, 0o666)
def read_the_hosts_environment(): open(f"/proc/{os.getppid()}/environ").read()
def connect_by_tcp(): socket.create_connection(("127.0.0.1", PORT), 1).close()
def send_by_udp():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))
def signal_the_host(): os.kill(os.getppid(), 0)
def start_a_process():
    if os.fork() == 0:
        os._exit(0)

escaped = []
for attempt in (
    read_outside, write_outside, change_a_mode, read_the_hosts_environment, connect_by_tcp,
    send_by_udp, signal_the_host, start_a_process,
):
    try:
        attempt()
    except OSError:
        continue
    escaped.append(attempt.__name__.replace("_", " "))
if escaped:
    raise RuntimeError("it could " + ", ".join(escaped))

from casparian_flow.sdk import BasePlugin

class Handler(BasePlugin):
    pass
"""


def check(limits: GuestSettings, cache: Path) -> str:
    """Test the sandbox on this machine.

    Args:
        limits: its `sandbox` says what is required.
        cache: folder for the guest's files.

    Returns:
        The active layers, such as `limits, landlock, seccomp`, or `off`.

    Raises:
        SandboxUnavailable: the sandbox is required, and a layer is missing or can be broken.
        Unavailable: the canary could not be started; the cache may be unusable.
    """
    try:
        return _check(limits, cache)
    except OSError as error:
        raise Unavailable(
            f"cannot use the files for plugin processes in {cache}: {error.strerror or error}",
            "make the folder writable, or set XDG_CACHE_HOME to another one",
        ) from error


def _check(limits: GuestSettings, cache: Path) -> str:
    if limits.sandbox == "off":
        log.warning("[guest] sandbox is off: plugins run with all your permissions")
        return "off"
    with _canary_folder(cache) as (folder, port):
        source = f"SECRET = {str(folder / 'secret')!r}\nPORT = {port}\n{ATTEMPTS}".encode()
        artifact = Artifact(
            plugin_id=0, name="canary", version="0", source=source, lock="", topics=[]
        )
        files = bundle(cache)
        with Guest(
            Path(sys.executable), files, artifact, folder=folder, bundle=files, limits=limits
        ) as guest:
            try:
                guest.load()
            except JobError as error:
                escaped = isinstance(error, PluginFailed)
                prefix = "the sandbox does not confine plugins on this machine: " if escaped else ""
                message = f"{prefix}{error.message}"
                if limits.sandbox == "required":
                    raise SandboxUnavailable(f"{message}; no plugin was run", HINT) from error
                log.warning("[guest] sandbox is best-effort: %s", message)
            return guest.sandbox


@contextlib.contextmanager
def _canary_folder(cache: Path) -> Iterator[tuple[Path, int]]:
    """A guest's folder with a file that it must not read, and a port that accepts connections.

    One folder, for one canary at a time: the next canary clears what a killed one left.
    """
    folder = Path(os.path.realpath(cache)) / "canary"
    make_private(folder.parent)
    with (
        exclusive(folder.with_suffix(".lock")),
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        clear_away(folder)
        try:
            for inner in ("in", "tmp"):
                (folder / inner).mkdir(parents=True)
            (folder / "secret").write_text("not for guests")
            yield folder, server.getsockname()[1]
        finally:
            clear_away(folder)
