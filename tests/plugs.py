"""Small plugins for tests, and how they are published without the command line."""

from __future__ import annotations

import contextlib
import functools
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger
from casparian_flow.engine import locking
from casparian_flow.protocol import Deploy
from casparian_flow.security import gatekeeper
from casparian_flow.services import architect

WITHOUT_PANDAS = f"""
# /// script
# dependencies = ["{locking.PYARROW}"]
# ///
"""
"""Where pandas is installed, pyarrow imports it for the first array: half of what a guest costs."""


def plugin(manifest: str, body: str, imports: str = "") -> str:
    """The source of a plugin, which may import pyarrow.

    Args:
        manifest: the arguments of its `PluginMetadata`.
        body: what `execute` does with `file_path`.
        imports: modules of the standard library, as `import` takes them.
    """
    head = f"import {imports}\n" if imports else ""
    return (
        f"\n{head}"
        "from casparian_flow.sdk import BasePlugin, PluginMetadata\n"
        "import pyarrow as pa\n\n"
        f"MANIFEST = PluginMetadata({manifest})\n\n"
        "class Handler(BasePlugin):\n"
        "    def execute(self, file_path: str):\n"
        + textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8)
        + f"\n{WITHOUT_PANDAS}"
    )


ROWS = plugin(
    'pattern="*.txt", topic="lines"',
    """
        with open(file_path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
        self.publish("lines", pa.table({"line": pa.array(lines, pa.string())}))
    """,
)

OTHER = ROWS.replace("*.txt", "*.text")
"""Another artifact of the same plugin."""

QUIET = ROWS.replace("        self.publish", "        if lines:\n            self.publish")
"""Publishes nothing where the file has no line."""

REJECTS = plugin(
    'pattern="*.txt", topic=["lines", "lines_rejects"]',
    """
        with open(file_path, "rb") as file:
            lines = [raw.rstrip(b"\\n").decode("latin-1") for raw in file]
        good = [line for line in lines if not line.startswith("!")]
        if good:
            self.publish("lines", pa.table({"line": pa.array(good, pa.string())}))
        bad = [(n, line) for n, line in enumerate(lines, 1) if line.startswith("!")]
        if bad:
            self.publish("lines_rejects", pa.table({
                "line": pa.array([n for n, _ in bad], pa.int64()),
                "reason": pa.array(["it shouts"] * len(bad), pa.string()),
                "raw": pa.array([line for _, line in bad], pa.string()),
            }))
        if "raise" in lines:
            raise ValueError("told to")
    """,
)
"""Lines that begin with `!` are rejects; one that is `raise` fails the attempt at its end."""

BEHAVES = plugin(
    'pattern="*.do", topic="done"',
    """
        what = open(file_path).read().strip()
        print("told to", what)
        if what == "raise":
            raise ValueError("no such thing")
        if what == "segfault":
            ctypes.string_at(0)
        if what == "exit":
            self.publish("done", pa.table({"what": ["half"]}))
            os._exit(0)
        if what == "hang":
            time.sleep(3600)
        if what == "undeclared":
            self.publish("elsewhere", pa.table({"what": [what]}))
        if what == "prose":
            self.publish("done", "just words")
        if what.startswith("slow"):
            time.sleep(float(what.split()[1]))
        self.publish("done", pa.table({"what": [what]}))
    """,
    imports="ctypes, os, sys, time",
)


LOCK = f"rows-dep==1.0 \\\n    --hash=sha256:{'0' * 64}\n"
"""Of plugins that are deployed and never run."""


def signed(
    ledger: Ledger,
    keys: Path,
    source: str = ROWS,
    version: str = "1.0.0",
    name: str = "rows",
    **options: Any,
) -> Deploy:
    """A plugin as `casparian publish` sends it, without an environment."""
    lock = options.pop("lock", LOCK)
    file = Path(f"{name}.py")
    return architect.sign(ledger, file, source.encode(), lock, name, version, keys, **options)


def publish(ledger: Ledger, settings: Settings, name: str, source: str, version: str) -> str:
    """Lock, sign and deploy a plugin's source; the environment is built on first use."""
    file = settings.home / f"{name}.py"
    file.write_text(source)
    return publish_file(ledger, settings, file, version)


def publish_file(ledger: Ledger, settings: Settings, file: Path, version: str) -> str:
    source, manifest = architect.read_plugin(file)
    keys = config.keys_folder()
    with remembered():
        lock = locking.lock_dependencies(file)
        signed = architect.sign(ledger, file, source, lock, manifest.name, version, keys)
        return architect.deploy(ledger, settings, signed)


# The suite publishes a thousand times, and most of a publication is waiting for uv.

_inspect = functools.cache(gatekeeper.inspect)
_resolve = locking.resolve
_resolved: dict[tuple[object, ...], str] = {}


def _resolve_once(plugin: Path, extra: Sequence[str], *declared: Path) -> str:
    """What the same requirements, under the same settings of uv, were resolved to before."""
    if any((plugin.parent / name).exists() for name in ("uv.toml", "pyproject.toml")):
        return _resolve(plugin, extra, *declared)
    uvs = sorted((name, value) for name, value in os.environ.items() if name.startswith("UV_"))
    asked = (*extra, *(repr(locking.script_block(file)) for file in declared), *uvs)
    if asked not in _resolved:
        _resolved[asked] = _resolve(plugin, extra, *declared)
    return _resolved[asked]


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Ask uv and the Gatekeeper once in a process about what is published again: the same bytes get
    the same answer. What fails is asked again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gatekeeper, "inspect", _inspect)
        patch.setattr(locking, "resolve", _resolve_once)
        yield


HOLDS = plugin(
    'pattern="*.txt", topic="lines"',
    """
        from casparian_flow.contract import Held

        with open(file_path) as file:
            lines = file.read().splitlines()
        if "new" in lines:
            raise Held("held: column rabatt is new")
        if "fake" in lines:
            raise ValueError("held: I want attention")
        self.publish("lines", pa.table({"line": pa.array(lines, pa.string())}))
    """,
)
"""Holds a file back that has the line `new`, and fails at one that has the line `fake`."""


def table(name: str, files: str, source: str = "") -> str:
    """A table in what the ledger sees of it: it publishes the lines of its files."""
    contract = {
        "table": name, "files": [files], "source": source,
        "columns": [{"name": "line", "type": "text"}],
    }  # fmt: skip
    return ROWS.replace(
        'pattern="*.txt", topic="lines"',
        f'pattern="{files}", topic="lines", catch_all=True, contract={contract!r}',
    )


CATCH_ALL = ROWS.replace('pattern="*.txt"', 'pattern="*.txt", catch_all=True')
"""Any text file is its, unless a table has it."""
