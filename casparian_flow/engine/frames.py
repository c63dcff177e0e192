"""The frames between a worker and its guest: pure, standard library only.

A frame is a 17 byte header (kind, job number, payload length; big endian) and a payload. Each
side owns one end of an inherited socketpair. The job number lets the host tell a stale frame from
a live one; it is 0 for LOAD, QUIT, LOCKED, READY and the FAILED of a plugin that cannot be loaded.

Host to guest: LOAD (one JSON line, then the plugin's source), RUN (JSON), QUIT.
Guest to host: LOCKED (JSON: what holds it, sent before any code but ours has run), READY (JSON:
the modules that were imported without byte code), BATCH (a topic's name, then one whole Arrow IPC
stream with one batch), END (JSON: a topic's batches, rows and SHA-256 over its IPC bytes), DONE
(nothing, or JSON like READY's), FAILED (JSON). End of file is never success: only DONE is.
"""

from __future__ import annotations

import struct
from enum import IntEnum

HEADER = struct.Struct(">BQQ")
TOPIC_LENGTH = struct.Struct(">H")
CONTROL_LIMIT = 8 << 20
"""Bytes of the largest JSON payload; a traceback is far smaller."""
BATCH_BYTES = 1 << 20
"""Bytes of Arrow data a guest aims at in one batch: large enough to be fast, small to hold."""
BATCH_ROWS = 1 << 16
"""Rows of the largest batch: columns of nulls have rows without having bytes."""


class FrameKind(IntEnum):
    """What a frame says."""

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
    """A whole frame with a small payload."""
    return HEADER.pack(kind, job, len(payload)) + payload
