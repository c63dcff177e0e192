"""What a plugin imports is in its environment, or it is told so before anything is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from casparian_flow.engine.environments import EnvironmentStore
from casparian_flow.engine.locking import check_imports, imports
from casparian_flow.errors import PluginError
from tests import wheels

BLOCK = '# /// script\n# dependencies = ["Frame.Works"]\n# ///\n'


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """frame_works, and what comes with it; modules of every kind, which say so if they are run."""
    base = tmp_path_factory.mktemp("packages")
    run = f"open({str(base / 'ran')!r}, 'w')\n"
    made = [
        wheels.wheel(base / "links", "frame_works", files={"frames/__init__.py": run}),
        wheels.wheel(base / "links", "numbered", files={"figures.py": run, "loose.pth": run}),
        wheels.wheel(base / "links", "pyarrow", files={"pyarrow/lib.py": run}),
        wheels.wheel(base / "links", "spaced", files={"space/one/__init__.py": run}),
        wheels.wheel(base / "links", "native", files={"native.abi3.so": ""}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        wheels.use(patch, base / "links")
        lock = "".join(map(wheels.pin, made))
        with EnvironmentStore(base / "envs", 1 << 30).lease(lock) as lease:
            yield lease.site_packages
    assert not (base / "ran").exists()


def check(tmp_path: Path, site_packages: Path, source: str) -> list[str]:
    file = tmp_path / "plugin.py"
    file.write_text(source)
    return check_imports(file, source.encode(), site_packages)


def names(source: str) -> list[str]:
    return sorted(found.name for found in imports(source.encode()))


def test_declared_and_standard_modules_need_no_word(tmp_path: Path, site_packages: Path) -> None:
    source = (
        f"{BLOCK}from __future__ import annotations\nimport os.path, zlib, winreg\n"
        "import frames.inner as f\nfrom frames import Frame\nimport pyarrow.parquet\n"
        "from casparian_flow.sdk import BasePlugin\n"
    )
    assert check(tmp_path, site_packages, source) == []


def test_what_is_not_there_is_named_with_its_lines(tmp_path: Path, site_packages: Path) -> None:
    source = f"{BLOCK}import frames\nimport requests\ndef f():\n    from yaml.x import y, z\n"
    source += "    import requests\n"
    with pytest.raises(PluginError) as refused:
        check(tmp_path, site_packages, source)
    assert refused.value.message.startswith(
        "plugin.py line 5 imports requests, line 7 imports yaml,"
    )
    assert refused.value.hint == (
        "add its package to the dependencies in the plugin's `# /// script` block; "
        "or catch ImportError, if the plugin can do without it"
    )


@pytest.mark.parametrize(
    ("beside", "source", "hint"),
    [
        ("pyproject.toml", "import requests", "in the pyproject.toml beside the plugin"),
        ("none", "import requests", '`# dependencies = ["pandas", "requests"]`'),
        ("helper.py", "import helper", "move helper.py into it"),
        ("frames.py", "from .frames import x", "a plugin is one file"),
        ("frames.py", "from . import frames", "a plugin is one file"),
    ],
)
def test_the_hint_says_where_to_declare(
    tmp_path: Path, site_packages: Path, beside: str, source: str, hint: str
) -> None:
    (tmp_path / beside).touch()
    with pytest.raises(PluginError, match="line 1 imports") as refused:
        check(tmp_path, site_packages, source)
    assert hint in refused.value.hint


@pytest.mark.parametrize("module", ["figures", "space.one", "native"])
def test_what_came_with_another_package_is_a_note(
    tmp_path: Path, site_packages: Path, module: str
) -> None:
    top = module.partition(".")[0]
    (note,) = check(tmp_path, site_packages, f"{BLOCK}import {module}\n")
    assert note.startswith(f"plugin.py line 4 imports {top},")
    assert "declare it" in note


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("try:\n    import a\nexcept ImportError:\n    import b\nelse:\n    import c", ["c"]),
        ("try:\n    import a\nexcept (OSError, ModuleNotFoundError):\n    a = None", []),
        ("try:\n    import a\nexcept ImportError:\n    pass\nfinally:\n    import b", ["b"]),
        ("try:\n    import a\nexcept ValueError:\n    pass", ["a"]),
        ("try:\n    import a\nexcept:\n    pass", ["a"]),
        ("import contextlib\nwith contextlib.suppress(ImportError):\n    import a", ["contextlib"]),
        ("with open('x'):\n    import a", ["a"]),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", ["b"]),
        ("import typing\nif typing.TYPE_CHECKING:\n    import a", ["typing"]),
        (
            "class A:\n    def f(self):\n        return [__import__ for x in ()]\n    import a",
            ["a"],
        ),
        ("async def f():\n    import a.b.c, d as e\n    from g.h import *", ["a", "d", "g"]),
        ("x = '\\d'\nimport a", ["a"]),
        ("if 0:\n    pass\n" + "elif 1:\n    pass\n" * 500 + "else:\n    import a", ["a"]),
    ],
)
def test_which_imports_count(source: str, found: list[str]) -> None:
    assert names(source) == found
