"""The product as a person has it: every event is a command of `casparian`, with its guests."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

from casparian_flow import crashpoints
from tests.commands import Casparian
from tests.truth.model import Artifact
from tests.truth.product import Product, source_of

HITS = 3
"""A killed command dies at most at this pass of a crash point."""


class Commands(Product):
    """`Product` through the command line."""

    events = (
        "write", "delete", "scan", "settle", "publish", "activate", "redo", "retry", "retract",
        "undo", "set_topic", "backup", "restore", "kill",
    )  # fmt: skip
    works_when_killed = True

    def __init__(self, folder: Path, kinds: dict[str, str]) -> None:
        super().__init__(folder, kinds)
        self._casparian = Casparian(self.home)
        self._random = random.Random(str(folder))

    def scan(self) -> None:
        self._casparian.run("scan")

    def work(self) -> None:
        self._drained()

    def _drained(self) -> None:
        with contextlib.suppress(AssertionError):  # it ends with 1 where a job has failed
            self._casparian.run("scan", "--drain")
            return
        self._casparian.run("scan", "--drain")

    def kill(self) -> None:
        """A command dies at a crash point, or comes to its end without it."""
        at = f"{self._random.choice(crashpoints.known())}:{self._random.randint(1, HITS)}"
        self._casparian.killed(at, "scan", "--drain")

    def publish(self, plugin: str, release: str, artifact: Artifact) -> None:
        file = self._casparian.plugin(plugin, source_of(plugin, artifact))
        self._casparian.run("publish", file, "--version", release)

    def activate(self, plugin: str, release: str) -> int:
        before = self._queued()
        self._casparian.run("plugins", "activate", plugin, release, "--reason", "a walk")
        return self._queued() - before

    def redo(self, plugin: str) -> int:
        before = self._queued()
        self._casparian.run("backfill", plugin, "--redo")
        return self._queued() - before

    def retry(self) -> None:
        self._casparian.run("jobs", "retry", "--failed")

    def _retract(self, path: str, ordinal: int, *, undo: bool = False) -> None:
        self._casparian.run("retract", self._name(path, ordinal), *(["--undo"] if undo else []))

    def set_topic(self, plugin: str, topic: str, sinks: dict[str, str]) -> None:
        uris = [f"{self.uris[sink]}?mode={mode}" for sink, mode in sinks.items()]
        self._casparian.run("topics", "set", plugin, topic, *uris)

    def backup(self) -> None:
        self._casparian.run("backup", self._backup, "--force")

    def problems(self) -> list[str]:
        found: list[str] = self._casparian.json("verify")["problems"]
        return found

    def _ask(self, question: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._casparian.json("query", question)
        return found
