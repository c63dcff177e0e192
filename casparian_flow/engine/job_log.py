"""What a plugin prints in one job, kept within bounds and safe to show."""

from __future__ import annotations

import re

HEAD = 16 << 10
TAIL = 48 << 10
"""Bytes kept: how it began, and above all how it ended."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that move a terminal's cursor or worse; newline and tab are not among them."""


class JobLog:
    """What a plugin printed, bounded: the first HEAD and the last TAIL bytes."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def write(self, data: bytes) -> None:
        """Append, forgetting the middle."""
        room = HEAD - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        surplus = max(len(self._tail) - TAIL, 0)
        del self._tail[:surplus]
        self._left_out += surplus

    def text(self) -> str:
        """All that was kept, safe to show on a terminal."""
        gap = f"\n[{self._left_out} bytes left out]\n".encode() if self._left_out else b""
        text = (self._head + gap + self._tail).decode(errors="replace")
        return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
