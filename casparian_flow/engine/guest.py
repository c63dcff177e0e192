"""The child's side: loads one plugin and runs it over one file after another.

Started by the bridge as `python -I -S <bundle>/casparian_flow/engine/guest.py <fd> <site-packages>
<confinement>` with nothing open but the wire (an inherited socket) and the standard streams. Only
the standard library is imported at the top: the plugin's environment becomes visible in `main`,
after the process has been locked down.
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
    sys.dont_write_bytecode = True  # there is nowhere to write it to
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    if sys.platform == "linux":
        die_with_host(wire)
    if not locked_down(wire, json.loads(confinement)):
        return
    # What follows runs code that is not ours: `.pth` files first of all.
    site.addsitedir(site_packages)
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        # By lines, so that a crash loses none; a file name that is not UTF-8 can be printed.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    serve(wire, site_packages)


def locked_down(wire: socket.socket, confinement: dict[str, Any]) -> bool:
    """Lock the process down and tell the host how far; False where that is not enough."""
    from casparian_flow.engine.frames import FrameKind, pack
    from casparian_flow.security import sandbox

    allowed = sandbox.Confinement(**confinement)
    level = sandbox.lock_down(allowed)
    said = {"layers": level.layers, "missing": level.missing}
    wire.sendall(pack(FrameKind.LOCKED, 0, json.dumps(said).encode()))
    return level.whole or allowed.mode != "required"


def die_with_host(wire: socket.socket) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends.

    As a subreaper it keeps the daemons a plugin may start among its descendants, where the host
    finds them when it kills the guest.
    """
    from casparian_flow.security import kernel

    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    poll = select.poll()
    poll.register(wire, 0)
    if poll.poll(0):  # hung up: the host ended before the kernel was told to watch it
        sys.exit("the host is gone")


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
                news = compiled_anew(site_packages) if len(sys.modules) > loaded else b""
                loaded = len(sys.modules)
                run.finish(news)
            clear(plugin["scratch"])


def compiled_anew(site_packages: str) -> bytes:
    """Source files of the environment that were imported and have no byte code, as JSON."""
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
    """Leave the next job nothing of this one's in the scratch folder, where there is one."""
    from casparian_flow import trees

    for name in os.listdir(scratch) if scratch else ():
        path = os.path.join(scratch, name)
        try:
            os.unlink(path)
        except OSError:
            trees.clear_away(path)


def receive(incoming: BinaryIO) -> tuple[FrameKind, int, bytes]:
    """The next frame; ends the process quietly when the host has hung up."""
    from casparian_flow.engine.frames import HEADER, FrameKind

    header = incoming.read(HEADER.size)
    if len(header) < HEADER.size:
        sys.exit()
    kind, job, length = HEADER.unpack(header)
    return FrameKind(kind), job, incoming.read(length)


if __name__ == "__main__":
    # Held by the module, not by a frame: the host reads the wire's end as the process's end.
    WIRE = socket.socket(fileno=int(sys.argv[1]))
    main(WIRE, sys.argv[2], sys.argv[3])
