"""Files of which every row is known, and the commands that make tables of them.

Each content is built from rows, so what the tables must hold is not computed by what is tested.
Two files come; then one is edited, one goes and a third comes; then the edited one's rows are
retracted, and reinstated: several versions, two topics in mode append and two in mode replace, a
file whose rows fill more than one batch, one that gives nothing where it gave rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from casparian_flow import config
from casparian_flow.engine import sinks

TOPICS = {"lines": "append", "words": "append", "now": "replace", "firsts": "replace"}
"""Topic -> its mode. `now` has the lines of a file, `firsts` the first word of each."""

PLACES = {"lines": 0, "now": 0, "words": 1, "firsts": 1}
"""Topic -> which of a scene's two sinks it goes to."""

ENOUGH = 3
"""A file with fewer lines gives nothing to `firsts`."""

LONG = 17_000
"""Words of the long content: more than one batch of the SQLite sink."""

CONFIG = """\
[database]
db_location = "casparian_flow.sqlite3"
[jobs]
retry_seconds = 0.1
[workers]
count = 1
[guest]
sandbox = "best-effort"
"""
"""One worker, so that a second run comes to the same points; what holds a guest is not tried."""

PLUGIN = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(pattern="*.txt", sinks={sinks})

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path) as file:
            lines = file.read().splitlines()
        for topic in ("lines", "now"):
            self.publish(topic, pa.table({{"line": pa.array(lines, pa.string())}}))
        words = [word for line in lines for word in line.split()]
        self.publish("words", pa.table({{"word": pa.array(words, pa.string())}}))
        if len(lines) >= {enough}:
            firsts = [line.split()[0] for line in lines]
            self.publish("firsts", pa.table({{"word": pa.array(firsts, pa.string())}}))
"""


class Content(NamedTuple):
    """What a file holds, and the rows that it must give."""

    lines: list[str]
    words: list[str]

    @property
    def data(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def rows(self, topic: str) -> list[str]:
        if topic == "firsts":
            return [line.split()[0] for line in self.lines] if len(self.lines) >= ENOUGH else []
        return self.words if topic == "words" else self.lines


def _content(name: str, lines: int, words: int) -> Content:
    """So many lines of so many words, which no other content has."""
    rows = [[f"{name}-{line}-{word}" for word in range(words)] for line in range(lines)]
    return Content([" ".join(row) for row in rows], [word for row in rows for word in row])


Files = dict[str, Content | None]
"""Relative path -> what it holds from now on; None: it is deleted."""

FIRST: Files = {
    "orders.txt": _content("orders", 3, 2),
    "deep/long.txt": _content("long", 17, LONG // 17),
}
SECOND: Files = {
    "orders.txt": _content("orders-edited", 2, 3),
    "deep/long.txt": None,
    "deep/new.txt": _content("new", 4, 1),
}
EDITED = "inbox/orders.txt"
MOVED: Files = {"deep/new.txt": None, "moved.txt": SECOND["deep/new.txt"]}
LAST: Files = {"last.txt": _content("last", 1, 1)}


class Act(NamedTuple):
    """A command a person types, and what happens to the files before."""

    name: str
    arguments: list[str]
    files: Files
    again: int = 0
    """What it may end with as well, when it was done before the crash and says so."""
    retracted: str = ""
    """The path whose rows nobody sees when it is done."""
    moved: tuple[str, str] | None = None
    """The path of a file before, and where it is now."""


@dataclass
class Ground:
    """Where a trial takes place; it can be put back as it was.

    Args:
        scratch: a folder of our own.
    """

    scratch: Path

    @property
    def home(self) -> Path:
        """Configuration, ledger and state."""
        return self.scratch / "ground" / "home"

    @property
    def sink(self) -> Path:
        """Where tables go."""
        return self.scratch / "ground" / "sink"

    @property
    def person(self) -> Path:
        """Keys."""
        return self.home / "person"

    @property
    def inbox(self) -> Path:
        """The source root."""
        return self.scratch / "inbox"

    def prepare(self) -> None:
        """Make the empty ground."""
        for folder in (self.home, self.sink, self.inbox):
            folder.mkdir(parents=True)

    def save(self, name: str) -> None:
        """Remember how it is."""
        shutil.copytree(self.scratch / "ground", self._saved(name), symlinks=True)

    def restore(self, name: str) -> None:
        """Put it back as it was."""
        shutil.rmtree(self.scratch / "ground")
        shutil.copytree(self._saved(name), self.scratch / "ground", symlinks=True)

    def forget(self, name: str) -> None:
        """Forget how it was then."""
        shutil.rmtree(self._saved(name))

    def _saved(self, name: str) -> Path:
        return self.scratch / "saved" / name


class Scene:
    """The files, the plugin and the commands, on a ground.

    Args:
        ground: prepared.
        kinds: `parquet` or `sqlite` for each of its two sinks.
    """

    def __init__(self, ground: Ground, kinds: Sequence[str]) -> None:
        self.ground = ground
        self.uris = {
            topic: f"parquet://{ground.sink}/tables"
            if kinds[PLACES[topic]] == "parquet"
            else f"sqlite:///{ground.sink}/tables.sqlite3"
            for topic in TOPICS
        }
        self.locations = {
            topic: sinks.resolve(uri, ground.home) for topic, uri in self.uris.items()
        }
        self._config = ground.home / config.FILE_NAME
        self._config.write_text(f"{CONFIG}[output]\nroots = {json.dumps([str(ground.sink)])}\n")
        plugin = ground.scratch / "rows.py"
        plugin.write_text(PLUGIN.format(sinks=self.uris, enough=ENOUGH))
        drain = ["scan", "--drain"]
        self.acts = [
            Act("watch", ["source", "add", str(ground.inbox), "--settle", "0"], {}, again=66),
            Act("publish", ["publish", str(plugin), "--version", "1.0.0"], {}),
            *(
                Act(f"set {topic}", ["topics", "set", "rows", topic, uri, "--mode", "replace"], {})
                for topic, uri in self.uris.items()
                if TOPICS[topic] == "replace"
            ),
            Act("first", drain, FIRST),
            Act("second", drain, SECOND),
            Act("retract", ["retract", EDITED], {}, again=66, retracted="orders.txt"),
            Act("reinstate", ["retract", EDITED, "--undo"], {}, again=66),
            Act("move", drain, MOVED, moved=("deep/new.txt", "moved.txt")),
            Act("last", drain, LAST),
        ]

    def command(self, act: Act) -> list[str]:
        """The arguments of `casparian`."""
        return ["--config", str(self._config), *act.arguments]

    def settings(self) -> config.Settings:
        """The configuration in force."""
        return config.load(str(self._config))

    def put_files(self, act: Act) -> None:
        """Have the inbox be as it is when the act begins, whatever was there."""
        here: Files = {}
        for earlier in self.acts[: self.acts.index(act) + 1]:
            here.update(earlier.files)
        if act.moved:
            old, new = (self.ground.inbox / path for path in act.moved)
            if old.exists():
                old.rename(new)
        for path, content in here.items():
            file = self.ground.inbox / path
            if content is None:
                file.unlink(missing_ok=True)
            elif not file.exists() or file.read_bytes() != content.data:
                file.parent.mkdir(exist_ok=True)
                temporary = file.with_name(f"{file.name}.tmp")
                temporary.write_bytes(content.data)
                os.replace(temporary, file)
        for file in self.ground.inbox.rglob("*.txt"):
            if here.get(str(file.relative_to(self.ground.inbox))) is None:
                file.unlink()

    def versions(self, act: Act) -> dict[str, list[Content]]:
        """Every content each location has had when the act is done, in order."""
        found: dict[str, list[Content]] = {}
        for earlier in self.acts[: self.acts.index(act) + 1]:
            for path, content in earlier.files.items():
                if content is not None:
                    found.setdefault(path, []).append(content)
        return found

    def shown(self, act: Act, topic: str) -> list[Content]:
        """The contents whose rows a reader of a topic sees when the act is done."""
        versions = self.versions(act)
        versions.pop(act.retracted, None)
        for earlier in self.acts[: self.acts.index(act) + 1]:
            if earlier.moved:
                versions.pop(earlier.moved[0])
        last = -1 if TOPICS[topic] == "replace" else 0
        return [content for contents in versions.values() for content in contents[last:]]

    def contents(self) -> dict[str, Content]:
        """Every content that any act brings, by its hash."""
        contents = [c for many in self.versions(self.acts[-1]).values() for c in many]
        return {content.hash: content for content in contents}
