"""What was done and what was found, a JSON line each, in the state folder: it outlives us."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from proofs.chaos.gauge import Verdict
from proofs.chaos.oracle import KINDS


class Tally:
    """Kills, checkpoints and violations, of this run and of those before it in this folder.

    Args:
        folder: the state folder.
        aloud: print each line as it is written.
    """

    def __init__(self, folder: Path, *, aloud: bool) -> None:
        self._file = folder / "chaos.jsonl"
        self._aloud = aloud
        self._lock = threading.Lock()  # readers complain from a thread of their own
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.checked = 0
        """Kills before the last checkpoint."""
        self.checkpoints = 0
        self.violations: Counter[str] = Counter()
        self.retried = 0
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                self._count(json.loads(line))

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def note(self, what: str, **facts: Any) -> None:
        """Keep an event."""
        event = {"at": time.strftime("%Y-%m-%dT%H:%M:%S"), "what": what, **facts}
        with self._lock:
            with self._file.open("a") as file:
                file.write(json.dumps(event) + "\n")
            self._count(event)
            if self._aloud:
                told = "  ".join(f"{key} {value}" for key, value in facts.items())
                print(f"{event['at'][11:]}  {what:<10}  {told}", flush=True)

    def complain(self, kind: str, words: str) -> None:
        """Keep a violation."""
        self.note("violation", kind=kind, words=words)

    def summary(self) -> str:
        """The kills in words."""
        kills = ", ".join(f"{n} {target}" for target, n in sorted(self.kills.items()))
        bound = f"{3 / self.checked:.2%}" if self.checked else "not known yet"
        lines = [
            f"kills        {self.total} ({kills}); {self.checked} of them checked, "
            f"at {self.checkpoints} checkpoints",
            f"given up     {self.retried} jobs were killed as often as jobs may be, said so, and "
            "ended well when retried",
            self.found(),
        ]
        if not self.violations:
            lines.append(f"bound        with 95 % confidence fewer than {bound} of kills do harm")
        return "\n".join(lines)

    def soaked(self, verdict: Verdict) -> str:
        """The soak in words."""
        faults = ", ".join(f"{n} {fault}" for fault, n in sorted(self.faults.items()))
        return "\n".join([f"faults       {faults}", *verdict.words, self.found()])

    def found(self) -> str:
        """The violations, and where the evidence is."""
        counts = ", ".join(f"{self.violations[kind]} {kind}" for kind in KINDS)
        kept = f" (evidence: {self._file.parent}; nothing was removed)" if self.violations else ""
        return f"violations   {counts}{kept}"

    def _count(self, event: dict[str, Any]) -> None:
        match event["what"]:
            case "kill":
                self.kills[event["target"]] += 1
            case "fault":
                self.faults[event["fault"]] += 1
            case "checkpoint":
                self.checkpoints += 1
                self.checked = self.total
            case "violation":
                self.violations[event["kind"]] += 1
            case "retry":
                self.retried += event["jobs"]
