"""The frames between a Worker and its guest. Pure; standard library only.

A frame is a 17 byte header (kind, job number, payload length; big endian) and a payload, over an
inherited socketpair. The job number distinguishes a stale frame from a current one; it is 0 for
LOAD, QUIT, LOCKED, READY and for the FAILED of a plugin that cannot be loaded.

Host to guest:

    LOAD      one JSON line, then the plugin's source
    RUN       JSON: the file
    QUIT

Guest to host:

    LOCKED    JSON: the sandbox's layers; sent before any foreign code runs
    READY     JSON: modules that were imported without byte code
    BATCH     a topic's name, then an Arrow IPC stream with one batch
    END       JSON: a topic's batches, rows and SHA-256 over its IPC bytes
    DONE      empty, or JSON as in READY; end of file without DONE is a failure
    FAILED    JSON
"""

from __future__ import annotations

import struct
from enum import IntEnum

HEADER = struct.Struct(">BQQ")
TOPIC_LENGTH = struct.Struct(">H")
CONTROL_LIMIT = 8 << 20
"""Bytes of a JSON payload at most; a traceback is far smaller."""
BATCH_BYTES = 1 << 20
"""Target size of a batch: large enough to be fast, small enough to keep in memory."""
BATCH_ROWS = 1 << 16
"""Rows of a batch at most: a column of nulls has rows without bytes."""


class FrameKind(IntEnum):
    """Kind of a frame."""

    LOAD = 1
    RUN = 2
    QUIT = 3
    LOCKED = 15
    READY = 16
    BATCH = 17
    END = 18
    DONE = 19
    FAILED = 20


def pack(kind: FrameKind, job: int, payload: bytes = b"") -> bytes:
    """A frame with a small payload."""
    return HEADER.pack(kind, job, len(payload)) + payload
