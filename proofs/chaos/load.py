"""The load: a thread that writes, edits, renames and deletes files, and never stops to ask."""

from __future__ import annotations

import hashlib
import random
import threading

from proofs.chaos.history import Content, History

FOLDERS = ("once", "twice", "twice/deep")
"""Of these, a second plugin takes what is in `twice`."""

NAMES = 100
"""Files a folder has at the most: so few that each is edited often."""

LINES = 40
SLOW_SECONDS = 0.1
"""Pause of a writer that writes in two parts; shorter than the settle window."""


class Load(threading.Thread):
    """Changes the source root until told to end.

    Args:
        history: told of each change before it is made.
        seed: of what is done, and when.
        rate: changes a second, on average.
    """

    def __init__(self, history: History, seed: str, rate: float) -> None:
        super().__init__(name="load", daemon=True)
        self.turn = threading.Lock()
        """Held while a file is changed: whoever has it finds every file at rest."""
        self.changes = 0
        self._history = history
        self._random = random.Random(seed)
        self._rate = rate
        self._ended = threading.Event()
        for folder in FOLDERS:
            (history.root / folder).mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        while not self._ended.wait(self._random.expovariate(self._rate)):
            with self.turn:
                self._change()
                self.changes += 1

    def end(self) -> None:
        self._ended.set()
        if self.ident is not None:
            self.join()

    def _change(self) -> None:
        paths = sorted(self._history.present)
        how = self._random.choices(
            [self._replace, self._rewrite, self._append, self._write_slowly, self._go_back,
             self._rename, self._remove],
            [6, 4, 3, 2, 2, 2, 1],
        )[0]  # fmt: skip
        path = (
            self._random.choice(paths)
            if paths and self._random.random() < 0.7
            else self._some_path()
        )
        how(path)

    def _some_path(self) -> str:
        return f"{self._random.choice(FOLDERS)}/{self._random.randrange(NAMES)}.txt"

    def _content(self) -> Content:
        return self._history.fresh(self._random.randrange(LINES))

    def _replace(self, path: str) -> None:
        """As careful writers do: a temporary file, and a rename over the old one."""
        self._put(path, self._content())

    def _put(self, path: str, content: Content) -> None:
        self._history.intend(path, content)
        temporary = self._history.root / f"{path}.tmp"
        temporary.write_bytes(content.data)
        temporary.replace(self._history.root / path)
        self._is_now(path, content)

    def _rewrite(self, path: str) -> None:
        content = self._content()
        self._history.intend(path, content)
        (self._history.root / path).write_bytes(content.data)
        self._is_now(path, content)

    def _append(self, path: str) -> None:
        old = self._now(path)
        longer = old._replace(lines=old.lines + self._random.randrange(1, 5))
        if old.number == 0:  # an empty file is nobody's beginning
            return self._rewrite(path)
        self._history.intend(path, longer)
        with (self._history.root / path).open("ab") as file:
            file.write(longer.data.removeprefix(old.data))
        return self._is_now(path, longer)

    def _write_slowly(self, path: str) -> None:
        content = self._content()
        half = content._replace(lines=content.lines // 2)
        self._history.intend(path, half)  # a writer that is held up for long leaves it at rest
        self._history.intend(path, content)
        with (self._history.root / path).open("wb", buffering=0) as file:
            file.write(half.data)
            self._ended.wait(SLOW_SECONDS)
            file.write(content.data.removeprefix(half.data))
        self._is_now(path, content)

    def _go_back(self, path: str) -> None:
        """A, B, A: three versions, and the first one's bytes again."""
        known = sorted(self._history.written[path])
        self._put(path, self._history.contents[self._random.choice(known)])

    def _rename(self, path: str) -> None:
        if path not in self._history.present:
            return self._replace(path)
        target = self._some_path()
        content = self._now(path)
        self._history.intend(target, content)
        (self._history.root / path).rename(self._history.root / target)
        del self._history.present[path]
        return self._is_now(target, content)

    def _remove(self, path: str) -> None:
        (self._history.root / path).unlink(missing_ok=True)
        self._history.present.pop(path, None)

    def _now(self, path: str) -> Content:
        digest = self._history.present.get(path)
        return self._history.contents[digest] if digest else Content(0, 0)

    def _is_now(self, path: str, content: Content) -> None:
        self._history.present[path] = hashlib.sha256(content.data).hexdigest()
