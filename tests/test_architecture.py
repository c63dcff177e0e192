"""The shape of the house: imports point down, rooms stay small, the front door opens fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.engine.bundle import BUNDLED

PACKAGE = Path(__file__).parent.parent / "casparian_flow"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    ["cli", "__main__", "selftest"],
    ["main"],
    ["services.retract"],
    ["services.backup", "services.outputs", "services.backfill"],
    [
        "services.changes",
        "services.topics",
        "services.keys",
        "services.plugins",
        "services.report",
        "services.idle",
        "services.verify",
        "services.query",
        "services.demo",
    ],
    ["services.watch", "services.architect"],
    ["services.scout", "engine.sentinel", "engine.worker_client"],
    [
        "services.scan",
        "services.scrub",
        "services.watcher",
        "engine.committer",
        "engine.retries",
        "engine.dispatch",
        "engine.runner",
        "engine.control",
    ],
    [
        "services.look",
        "services.walk",
        "services.root",
        "services.vanished",
        "services.hints",
        "services.inventory",
        "services.places",
    ],
    ["services.snapshots", "services.snapshot_checks"],
    [
        "engine.canary",
        "engine.answers",
        "engine.peer",
        "engine.bridge",
        "engine.bundle",
        "engine.batches",
        "engine.job_log",
        "engine.reports",
        "engine.guest_process",
        "engine.thread_watch",
        "engine.inbox",
        "engine.placing",
        "engine.in_hand",
        "engine.endings",
        "engine.holdings",
        "engine.one_thread",
        "engine.venv_manager",
        "engine.undeclared",
        "engine.rejects",
        "engine.byte_code",
        "engine.locking",
        "engine.handshake",
        "engine.wire",
    ],
    ["engine.sinks"],
    ["db.scrubs", "db.backfill", "db.retracted"],
    [
        "db.files",
        "db.unrouted",
        "db.unsettled",
        "db.doubts",
        "db.presence",
        "db.roots",
        "db.outputs",
        "db.views",
        "db.wiring",
        "db.invariants",
        "db.replay",
        "db.snapshots",
    ],
    ["db.backup"],
    ["db.jobs", "db.attempts", "db.plugins", "db.trust", "db.audit", "db.found"],
    ["db.failures", "db.rejects"],
    ["db.routing", "db.shown", "db.pages"],
    ["db.access"],
    ["db.schema", "db.connection"],
    ["db.seals"],
    ["db.models"],
    ["db.evidence"],
    ["db.base", "db.states", "db.chain"],
    [
        "engine.guest",
        "engine.attempt",
        "engine.sizes",
        "engine.layouts",
        "security",
        "sink_uri",
        "protocol",
        "engine.frames",
    ],
    ["config", "daemon_lock"],
    ["sections"],
    [
        "errors",
        "atomic",
        "sdk",
        "trees",
        "crashpoints",
        "mounts",
        "services.aside",
        "wording",
        "topics",
    ],
]
"""From the roof down; a module may import from its own layer and from those below."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    """The lowest index whose entry is the module or a package around it."""
    for depth, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return depth
    raise AssertionError(f"{module} has no place in LAYERS")


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("casparian_flow.") for name in names if known(name)}
    return found


def known(name: str) -> bool:
    if not name.startswith("casparian_flow."):
        return False
    path = PACKAGE / name.removeprefix("casparian_flow.").replace(".", "/")
    return path.with_suffix(".py").is_file() or (
        (path / "__init__.py").is_file() and (path / "__init__.py").stat().st_size > 0
    )


def external(path: Path) -> set[str]:
    """Top-level names of other packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


CODE = [path for path in MODULES if module_name(path) and path.stat().st_size]


@pytest.mark.parametrize("path", CODE, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    here = module_name(path)
    for other in imports(path):
        assert layer(here) <= layer(other), f"{here} must not import {other}"


@pytest.mark.parametrize("path", CODE, ids=module_name)
def test_rooms_are_small(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= 700, f"{module_name(path)} has {lines} lines"


def test_the_workers_side_never_touches_the_ledger() -> None:
    for name in ("worker_client", "runner", "bridge", "inbox", "venv_manager", "guest"):
        path = PACKAGE / "engine" / f"{name}.py"
        reached = {path}
        queue = [path]
        while queue:
            for other in imports(queue.pop()):
                file = PACKAGE / (other.replace(".", "/") + ".py")
                if not file.is_file():
                    file = PACKAGE / other.replace(".", "/") / "__init__.py"
                if file not in reached:
                    reached.add(file)
                    queue.append(file)
        assert not [module_name(p) for p in reached if module_name(p).startswith("db.")], name


def test_the_guest_needs_the_standard_library_only() -> None:
    standard = sys.stdlib_module_names | {"__future__", "casparian_flow"}
    for name in BUNDLED:
        more = {"pyarrow"} if name in ("engine/attempt.py", "engine/layouts.py") else set()
        assert external(PACKAGE / name) <= standard | more, name
        assert imports(PACKAGE / name) <= {module_name(PACKAGE / other) for other in BUNDLED}, name


def test_sql_lives_in_db_and_sinks() -> None:
    for path in CODE:
        name = module_name(path)
        if not name.startswith(("db.", "engine.sinks")):
            allowed = {"services.scout": {"sqlalchemy"}}  # its contract takes a user's Session
            used = external(path) & {"sqlalchemy", "sqlite3"} - allowed.get(name, set())
            only_types = "from sqlalchemy import Connection" in path.read_text("utf-8")
            assert not used or (used == {"sqlalchemy"} and only_types), name


def test_zmq_lives_at_the_sockets() -> None:
    users = {module_name(path) for path in CODE if "zmq" in external(path)}
    sockets = {"sentinel", "handshake", "wire", "worker_client", "control"}
    assert users == {"main", *(f"engine.{name}" for name in sockets)}


def test_the_environment_is_read_in_config_only() -> None:
    readers = {module_name(path) for path in CODE if "os.environ" in path.read_text("utf-8")}
    assert readers == {"config"}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {path.stem for path in MODULES} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_help_imports_nothing_heavy() -> None:
    heavy = {
        "sqlalchemy", "pandas", "pyarrow", "duckdb", "zmq", "nacl", "watchdog", "numpy", "asyncio",
        "uv", "pathspec", "wcmatch", "msal", "jwt", "requests", "cryptography",
    }  # fmt: skip
    code = (
        "import sys\n"
        "from casparian_flow.cli import main\n"
        "sys.argv = ['casparian', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert not loaded & heavy
