"""What was written to the source root, byte for byte: the oracle that owes nothing to the product.

A journal in the state folder, one JSON line for each change. It is written before the change, so
that whoever is interrupted between the two knows what the file can be; what it is, the disk says.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

EMPTY = hashlib.sha256(b"").hexdigest()


class Content(NamedTuple):
    """Bytes that a file can have: `lines` lines `number,0`, `number,1`, ..."""

    number: int
    lines: int

    @property
    def data(self) -> bytes:
        return b"".join(b"%d,%d\n" % row for row in self.rows)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """What the plugin makes of it."""
        return [(self.number, line) for line in range(self.lines)]


class History:
    """Every content that every path was given, and the one it has now.

    Args:
        folder: where the journal is kept; what is in it already is read.
        root: the source root.

    Raises:
        AssertionError: a file holds what was never written to it.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.root = root
        self.contents: dict[str, Content] = {EMPTY: Content(0, 0)}
        """SHA-256 -> what has it."""
        self.written: dict[str, set[str]] = defaultdict(lambda: {EMPTY})
        """Path -> SHA-256 of all that it may ever have held; a file being rewritten is empty."""
        self.present: dict[str, str] = {}
        """Path -> SHA-256 of what it holds now."""
        self.last = 0
        journal = folder / "history.jsonl"
        if journal.exists():
            for line in journal.read_text().splitlines():
                self._note(*json.loads(line))
        self._journal = journal.open("a")
        self.present = self.on_disk()
        for path, digest in self.present.items():
            assert digest in self.written[path], f"{path} holds what nobody wrote"

    def intend(self, path: str, content: Content) -> None:
        """Say what will be written, before it is."""
        self._note(path, *content)
        self._journal.write(json.dumps([path, *content]) + "\n")
        self._journal.flush()

    def fresh(self, lines: int) -> Content:
        """A content that no file had before."""
        self.last += 1
        return Content(self.last, lines)

    def on_disk(self) -> dict[str, str]:
        """Path -> SHA-256 of each file of the source root, read now."""
        return {
            file.relative_to(self.root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.root.rglob("*.txt"))
        }

    def close(self) -> None:
        self._journal.close()

    def _note(self, path: str, number: int, lines: int) -> None:
        content = Content(number, lines)
        digest = hashlib.sha256(content.data).hexdigest()
        self.contents[digest] = content
        self.written[path].add(digest)
        self.last = max(self.last, number)
