"""The shape of the house: imports point down, functions are short, the front door opens fast."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.engine.environments import BUNDLED

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "casparian_flow"
MODULES = sorted(PACKAGE.rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))

FUNCTION_LINES = 60
"""A function reads as a paragraph: its docstring and body; the options of a command are a list."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def test_imports_point_down_and_in_no_circle() -> None:
    """The contracts are in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*CODE, *PLUGINS], ids=lambda path: path.stem)
def test_a_function_is_a_paragraph(path: Path) -> None:
    long = [
        f"{node.name}: {lines} lines"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.body[0].lineno + 1) > FUNCTION_LINES
    ]
    assert not long


TABLES = ("candidates.py", "cells.py", "intake.py", "survey.py", "typed.py")
"""What a plugin imports only if it declares pyarrow."""


def test_the_guest_needs_the_standard_library_only() -> None:
    standard = sys.stdlib_module_names | {"__future__", "casparian_flow"}
    for name in BUNDLED:
        more = {"pyarrow"} if name in ("engine/attempt.py", *TABLES) else set()
        assert external(PACKAGE / name) <= standard | more, name
        assert imports(PACKAGE / name) <= {module_name(PACKAGE / other) for other in BUNDLED}, name


SQL_BESIDE_SINKS = {
    "engine.contents": {"sqlite3"},  # the store's rows, which Workers must not need the ledger for
    "services.topics": {"sqlalchemy"},
    "services.sources": {"sqlalchemy"},  # as their scans and routing are in services
    "services.scout": {"sqlalchemy"},  # its contract takes a user's Session
}


def test_sql_lives_in_db_and_sinks() -> None:
    """Elsewhere `Connection` is only the type of what is handed to `db`."""
    for path in CODE:
        name = module_name(path)
        if not name.startswith(("db.", "engine.sinks")):
            tree = ast.walk(ast.parse(path.read_text("utf-8")))
            used = external(path) & {"sqlalchemy", "sqlite3"}
            names = {
                alias.name
                for node in tree
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy")
                for alias in node.names
            }
            if names == {"Connection"}:
                used -= {"sqlalchemy"}
            assert used == SQL_BESIDE_SINKS.get(name, set()), (name, names)


def test_what_a_person_changes_is_audited_by_the_ledger() -> None:
    """`Ledger.change` appends their rows; these others, what the system does by itself."""
    by_itself = {"engine.committer", "engine.dispatch", "db.adopt", "db.versions"}
    writers = {module_name(path) for path in CODE if "audit.append(" in path.read_text("utf-8")}
    assert writers == by_itself
    importing = "from casparian_flow.db.audit import .*append"
    named = {module_name(path) for path in CODE if re.search(importing, path.read_text("utf-8"))}
    assert named == {"db.access"}


def test_zmq_lives_at_the_sockets() -> None:
    users = {module_name(path) for path in CODE if "zmq" in external(path)}
    sockets = {"sentinel", "wire", "worker_client", "control"}
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


FOLDERS = ("tests", "proofs", "benchmarks")
BESIDE = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_imported_from_the_package_is_there(path: Path) -> None:
    """Where a script or a command imports late, mypy and a run may not come by."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("casparian_flow"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
