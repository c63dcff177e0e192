"""The guest process: loads one plugin and runs it over one file after another.

The bridge starts it as `python -I -S <bundle>/casparian_flow/engine/guest.py <fd> <site-packages>
<confinement>`, with no open descriptors but the wire (an inherited socket) and the standard
streams. The top of this file imports only the standard library: `main` adds the plugin's
environment after the sandbox is active.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import select
import signal
import site
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from casparian_flow.engine.frames import FrameKind


def main(wire: socket.socket, site_packages: str, confinement: str) -> None:
    """Prepare the process, load the plugin, and serve jobs until the host hangs up."""
    os.set_inheritable(wire.fileno(), False)
    sys.dont_write_bytecode = True  # the environment is read-only
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    if sys.platform == "linux":
        die_with_host(wire)
    if not locked_down(wire, json.loads(confinement)):
        return
    # Foreign code runs from here on: `.pth` files are the first.
    site.addsitedir(site_packages)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        # Line buffered, so that a crash loses no line. Names that are not UTF-8 can be printed.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    serve(wire, site_packages)


def locked_down(wire: socket.socket, confinement: dict[str, Any]) -> bool:
    """Activate the sandbox and report it to the host; False if a required layer is missing."""
    from casparian_flow.engine.frames import FrameKind, pack
    from casparian_flow.security import sandbox

    allowed = sandbox.Confinement(**confinement)
    level = sandbox.lock_down(allowed)
    report = {"layers": level.layers, "missing": level.missing}
    wire.sendall(pack(FrameKind.LOCKED, 0, json.dumps(report).encode()))
    return level.whole or allowed.mode != "required"


def die_with_host(wire: socket.socket) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    It also becomes a subreaper, so that daemons started by the plugin stay its descendants, and the
    host can kill them with the guest.
    """
    from casparian_flow.security import kernel

    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    poll = select.poll()
    poll.register(wire, 0)
    if poll.poll(0):  # closed: the host ended before PR_SET_PDEATHSIG
        sys.exit("the host process ended")


def serve(wire: socket.socket, site_packages: str) -> None:
    """Answer LOAD, then every RUN, until QUIT or the end of the wire."""
    from casparian_flow.engine.attempt import PluginRun
    from casparian_flow.engine.frames import BATCH_BYTES, FrameKind
    from casparian_flow.sdk import FileInfo

    with (
        wire.makefile("rb") as incoming,
        cast("BinaryIO", wire.makefile("wb", BATCH_BYTES)) as outgoing,
    ):
        head, _, source = receive(incoming)[2].partition(b"\n")
        plugin = json.loads(head)
        run = PluginRun(outgoing, 0, plugin)
        try:
            handler = run.load(source)
        except BaseException as error:  # noqa: BLE001  a plugin may raise SystemExit too
            run.fail(error)
            return
        run.send(FrameKind.READY, compiled_anew(site_packages))
        loaded = len(sys.modules)
        while True:
            kind, job, payload = receive(incoming)
            if kind != FrameKind.RUN:
                return
            run = PluginRun(outgoing, job, plugin)
            try:
                run.execute(handler, FileInfo(**json.loads(payload)))
            except BaseException as error:  # noqa: BLE001
                run.fail(error)
            else:
                modules = compiled_anew(site_packages) if len(sys.modules) > loaded else b""
                loaded = len(sys.modules)
                run.finish(modules)
            clear(plugin["scratch"])


def compiled_anew(site_packages: str) -> bytes:
    """Imported source files of the environment that have no byte code, as JSON."""
    return json.dumps(list(_without_byte_code(site_packages))).encode()


def _without_byte_code(site_packages: str) -> Iterator[str]:
    from casparian_flow.engine.attempt import printable

    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        cached, origin = getattr(spec, "cached", None), getattr(spec, "origin", None)
        if not isinstance(origin, str) or not isinstance(cached, str):
            continue
        if origin.startswith(site_packages) and not os.path.exists(cached):
            yield printable(origin)


def clear(scratch: str) -> None:
    """Empty the scratch folder, if there is one, before the next job."""
    from casparian_flow import trees

    for name in os.listdir(scratch) if scratch else ():
        path = os.path.join(scratch, name)
        try:
            os.unlink(path)
        except OSError:
            trees.clear_away(path)


def receive(incoming: BinaryIO) -> tuple[FrameKind, int, bytes]:
    """Read the next frame; exit if the host closed the wire."""
    from casparian_flow.engine.frames import HEADER, FrameKind

    header = incoming.read(HEADER.size)
    if len(header) < HEADER.size:
        sys.exit()
    kind, job, length = HEADER.unpack(header)
    return FrameKind(kind), job, incoming.read(length)


if __name__ == "__main__":
    # A global, so that the wire stays open until the process ends, which the host sees by it.
    WIRE = socket.socket(fileno=int(sys.argv[1]))
    main(WIRE, sys.argv[2], sys.argv[3])
