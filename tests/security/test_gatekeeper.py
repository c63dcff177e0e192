"""The Gatekeeper finds what its rules name, lets sound plugins pass, and outlives any source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from casparian_flow.config import GatekeeperSettings
from casparian_flow.errors import ConfigError, PluginError, PolicyRefused
from casparian_flow.security import gatekeeper
from casparian_flow.security.gatekeeper import inspect
from casparian_flow.security.gatekeeper_child import Answer, Request, answer_to
from casparian_flow.security.manifest import read_manifest
from casparian_flow.security.rules import FINDINGS_LIMIT, RULESET, Policy
from proofs.hostile.corpus import ATTACKS, S_ROWS, UTF7, Attack
from tests import plugs

REPOSITORY = Path(__file__).parents[2]
BUNDLED = sorted((REPOSITORY / "plugins").glob("*.py"))
SOUND = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
MANIFEST = PluginMetadata(pattern="*.csv", topic="t", name="p")
class Handler(BasePlugin):
    def execute(self, file_path): pass
"""
NOTHING = Policy()


def policy(allow: tuple[str, ...] = (), forbid: tuple[str, ...] = ()) -> Policy:
    return Policy.of(GatekeeperSettings(allow=list(allow), forbid=list(forbid)))


def answer(source: bytes, judged_by: Policy = NOTHING) -> Answer:
    """What the child answers, without a child."""
    return answer_to(Request("p.py", judged_by), source)


def found(code: str, judged_by: Policy = NOTHING) -> list[str]:
    """The entries of what is found in a plugin that has this code besides."""
    judged = answer((SOUND + code).encode(), judged_by)
    assert judged.error is None
    return [finding.entry for finding in judged.findings]


# The corpus


@pytest.mark.parametrize("attack", S_ROWS, ids=lambda attack: attack.id)
def test_an_attack_is_found_with_its_rule_and_line(attack: Attack) -> None:
    findings = answer(attack.source).findings
    assert (attack.rule, attack.what, attack.line) in [(f.rule, f.what, f.line) for f in findings]
    assert all(finding.instead for finding in findings)


def test_code_in_a_comment_of_another_encoding_is_refused() -> None:
    with pytest.raises(PluginError, match="its encoding is utf-7, not UTF-8"):
        inspect(UTF7.source, "p.py", NOTHING)


def test_no_attack_is_found_where_there_is_none() -> None:
    idle = S_ROWS[0]._replace(body="return False")
    assert answer(idle.source).findings == []


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_every_attack_does_harm_where_nothing_stops_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    (tmp_path / "input").write_text(str(secret))
    done = subprocess.run(
        [sys.executable, "-m", "proofs.hostile.harm", str(tmp_path / "input")],
        cwd=REPOSITORY,
        env={**os.environ, "HOSTPW": "hunter2"},
        capture_output=True,
        check=True,
    )
    harms = json.loads(done.stdout.splitlines()[-1])
    assert harms == {attack.id: True for attack in ATTACKS}


# Sound plugins


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_the_bundled_plugins_pass(file: Path) -> None:
    source = file.read_bytes()
    inspection = inspect(source, file.name, NOTHING)
    inspection.require()
    assert inspection.findings == []
    assert inspection.manifest == read_manifest(source, file.name)


def test_the_documented_plugin_and_the_tests_own_pass() -> None:
    page = (REPOSITORY / "docs" / "writing_a_plugin.md").read_text("utf-8")
    documented = page.partition("```python\n")[2].partition("```")[0]
    for source in (documented, plugs.ROWS):
        assert answer(source.encode()).findings == []


@pytest.mark.parametrize(
    "code",
    [
        "import csv, json, xml.etree.ElementTree as tree, urllib.parse, concurrent.futures",
        "from urllib import parse\nfrom xml import etree\nfrom collections import abc",
        "from __future__ import annotations",
        "import numpy as np, pandas as pd, polars, duckdb, openpyxl.utils",
        "from casparian_flow import sdk",
        "with open('x') as file: hasattr(file, 'read') and isinstance(file, type(file))",
        "name = type(1).__name__",
        "if __name__ == '__main__': print(1)",
        "import re\nre.compile('x')",
        "from pathlib import Path\nPath('x').resolve().suffix",
        "con.query('select 1')",
        "import numpy\nnumpy.load('x', allow_pickle=False)",
        "'''Uses obj.__class__ to explain.'''",
        "class A:\n  '''__dict__'''\n  x: int\n  '''__globals__'''\n",
        "class A:\n  def __init__(self): super().__init__()\n  def __iter__(self): yield 1",
        "input = 1",
        "class A:\n  def eval(self): ...",
        "a = '__MACOSX/x' + '____' + '__x'",
        "match 1:\n  case int(real=r): ...",
        "# os.system",
    ],
)
def test_ordinary_code_passes(code: str) -> None:
    assert found(code) == []


# The rules, one by one


@pytest.mark.parametrize(
    ("code", "entries"),
    [
        ("import os.path", ["import:os"]),
        ("import os as json", ["import:os"]),
        ("from os import (\n  sep,\n  open)", ["import:os"]),
        ("def f():\n  try:\n    import socket\n  except: ...", ["import:socket"]),
        ("import _io, posix", ["import:_io", "import:posix"]),
        ("import distutils", ["import:distutils"]),
        ("from logging import config", ["import:logging.config"]),
        ("import concurrent.futures.process", ["import:concurrent.futures.process"]),
        ("from casparian_flow.engine import guest", ["import:casparian_flow.engine"]),
        ("from . import helper", ["import:."]),
        ("from ..lib.x import helper", ["import:..lib.x"]),
        ("from pandas import *", ["import:pandas.*"]),
        ("from pandas.io.common import os", ["attribute:os"]),
        ("import numpy.ctypeslib", ["attribute:ctypeslib"]),
        ("from numpy import ctypeslib as fine", ["attribute:ctypeslib"]),
        ("import random\nrandom._os", ["attribute:_os"]),
        ("f = [getattr]", ["name:getattr"]),
        ("def f(x=vars): ...", ["name:vars"]),
        ("del eval", []),
        ("@(lambda f: exec)\ndef g(): ...", ["name:exec"]),
        ("x.os = 1", ["attribute:os"]),
        ("case = 1\nmatch x:\n  case A(b=B(sys=s)): ...", ["attribute:sys"]),
        ("from functools import partial\npartial(f, allow_pickle=True)", ["keyword:allow_pickle"]),
        ("f(allow_pickle=0)", ["keyword:allow_pickle"]),
        ("x.__class__", ["dunder:__class__"]),
        ("def __getattr__(name): ...", ["dunder:__getattr__"]),
        ("class A:\n  def __del__(self): ...", ["dunder:__del__"]),
        ("__builtins__", ["dunder:__builtins__"]),
        ("def f(__code__): ...", ["dunder:__code__"]),
        ("f(__code__=1)", ["dunder:__code__"]),
        ("global __loader__", ["dunder:__loader__"]),
        ("import x as __y__", ["dunder:__y__"]),
        ("import x.__y__", ["dunder:__y__"]),
        ("try: ...\nexcept E as __e__: ...", ["dunder:__e__"]),
        ("match x:\n  case {**__r__}: ...\n  case [*__s__]: ...", ["dunder:__r__", "dunder:__s__"]),
        ("x = '__glo' 'bals__'", ["string:__globals__"]),
        ("x = b'__globals__'", ["string:__globals__"]),
        ("x = f'{y}.__class__.__mro__'", ["string:__class__", "string:__mro__"]),
        ("x = f'{y:__code__}'", ["string:__code__"]),
        ("x = '''doc'''.__doc__", ["dunder:__doc__"]),
    ],
)
def test_what_is_found(code: str, entries: list[str]) -> None:
    assert found(code) == entries


def test_findings_are_in_the_order_of_lines_and_bounded() -> None:
    judged = answer((SOUND + "import os\n" * 1000).encode())
    lines = [finding.line for finding in judged.findings]
    assert len(lines) == FINDINGS_LIMIT
    assert lines == list(range(lines[0], lines[0] + FINDINGS_LIMIT))


# Policy


@pytest.mark.parametrize(
    ("code", "allow", "forbid", "entries"),
    [
        ("import os\nimport sys", ["import:os"], [], ["import:sys"]),
        ("import os.path", ["import:os"], [], []),
        ("import logging.config", ["import:logging"], [], ["import:logging.config"]),
        ("import logging.config", ["import:logging.config"], [], []),
        ("getattr(x, 'os').os", ["name:getattr", "attribute:os"], [], []),
        ("x.__class__", ["string:__class__"], [], ["dunder:__class__"]),
        ("import requests.auth", [], ["import:requests"], ["import:requests"]),
        ("import requests.auth", [], ["import:requests.auth"], ["import:requests.auth"]),
        ("from pandas import io", [], ["import:pandas.io"], ["import:pandas.io"]),
        ("open('x')", [], ["name:open"], ["name:open"]),
        ("con.query('x')", [], ["attribute:query"], ["attribute:query"]),
        ("f(engine='python')", [], ["keyword:engine"], ["keyword:engine"]),
        ("x = '__name__'", [], ["string:__name__"], ["string:__name__"]),
        ("import os", ["import:os"], ["import:os"], ["import:os"]),
    ],
)
def test_a_policy_allows_and_forbids(
    code: str, allow: list[str], forbid: list[str], entries: list[str]
) -> None:
    assert found(code, policy(tuple(allow), tuple(forbid))) == entries


@pytest.mark.parametrize("entry", ["os", "module:os", "import:", "", ":os", "Import:os"])
def test_an_entry_of_no_known_kind(entry: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(forbid=(entry,))
    assert f"[gatekeeper] forbid has {entry!r}" in caught.value.message
    assert "import, name, attribute, keyword, dunder, string" in caught.value.message
    assert "import:os" in caught.value.hint


def test_a_refusal_lists_every_finding_and_what_would_allow_it() -> None:
    code = SOUND + "import os, requests\nx = getattr(os, 'y')\nos.__dict__\n"
    judged_by = policy(("keyword:x",), ("import:requests",))
    inspection = inspect(code.encode(), "sales.py", judged_by)
    with pytest.raises(PolicyRefused) as caught:
        inspection.require()
    headline, *lines = caught.value.message.splitlines()
    assert headline == "sales.py has 4 mentions that the policy forbids:"
    assert [line.partition(";")[0] for line in lines] == [
        "sales.py line 6: [import] os",
        "sales.py line 6: [import] requests",
        "sales.py line 7: [name] getattr",
        "sales.py line 8: [dunder] __dict__",
    ]
    assert lines[1].endswith("; the configuration forbids it: [gatekeeper] forbid")
    assert caught.value.hint == (
        "change these lines, or set [gatekeeper] allow = "
        '["import:os", "name:getattr", "dunder:__dict__"]'
    )
    verdict = {
        "ruleset": RULESET,
        "allow": ["keyword:x"],
        "forbid": ["import:requests"],
        "findings": 4,
        "passed": False,
    }
    assert json.loads(json.dumps(inspection.verdict)) == verdict


def test_what_was_found_cannot_steer_a_terminal() -> None:
    with pytest.raises(PolicyRefused) as caught:
        inspect((SOUND + f"x.__{'y' * 5000}__\n").encode(), "p.py", NOTHING).require()
    assert len(caught.value.message) < 400
    assert caught.value.message.replace("\n", "").isprintable()


# Sources made to hurt the reader


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"#" * 10_000_000, "has 10000000 bytes"),
        (b"x = " + b"(" * 5000 + b")" * 5000, "too many nested parentheses"),
        (b"x = 1\0", "has NUL bytes"),
        (b"x = " + b"-" * 100_000 + b"1", "nests expressions too deeply"),
        (b"x = a" + b".a" * 100_000, "nests expressions too deeply"),
        (b"x = " + b"not " * 100_000 + b"1", "nests expressions too deeply"),
        (b"\xff\xfe", "invalid or missing encoding"),
        (b"\xef\xbb\xbf# coding: latin-1\n", "encoding problem"),
        (b"", "has no MANIFEST"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_source_that_cannot_be_read_is_refused_in_words(source: bytes, says: str) -> None:
    with pytest.raises(PluginError) as caught:
        inspect(source, "p.py", NOTHING)
    assert says in caught.value.message
    assert caught.value.hint


def test_the_refusal_is_the_one_of_read_manifest() -> None:
    source = SOUND.replace("pattern=", "patern=").encode()
    with pytest.raises(PluginError) as expected:
        read_manifest(source, "p.py")
    with pytest.raises(PluginError) as caught:
        inspect(source, "p.py", NOTHING)
    assert (caught.value.message, caught.value.hint) == (
        expected.value.message,
        expected.value.hint,
    )


def test_a_mark_and_mixed_line_ends_keep_the_lines() -> None:
    source = b"\xef\xbb\xbf# one\r\n# two\r# three\n" + SOUND.encode() + b"import os\r\n"
    assert [finding.line for finding in inspect(source, "p.py", NOTHING).findings] == [9]


def test_a_files_name_that_is_not_unicode() -> None:
    name = os.fsdecode(b"caf\xe9.py")
    assert inspect(SOUND.encode(), name, NOTHING).manifest.name == "p"


@hypothesis_settings(max_examples=10, deadline=None)
@given(st.text() | st.text("()[]{}'\"\\:\n x=.@"))
@pytest.mark.slow
def test_any_text_is_answered(text: str) -> None:
    source = text.encode("utf-8", "surrogatepass")
    try:
        inspect(source, "p.py", NOTHING).require()
    except PluginError as error:
        assert error.hint


@hypothesis_settings(deadline=None)
@given(st.lists(st.sampled_from([attack.body for attack in ATTACKS]) | st.text(), max_size=3))
def test_any_code_is_judged_or_refused_in_words(parts: list[str]) -> None:
    source = (SOUND + "\n".join(parts)).encode("utf-8", "surrogatepass")
    judged = answer(source)
    if judged.error:
        assert all(judged.error)
    else:
        assert all(finding.line and finding.instead for finding in judged.findings)


# A child in trouble


def child_is(script: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Have the Gatekeeper start a shell script in place of the interpreter."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o700)
    patch.setattr(sys, "executable", str(file))


@pytest.mark.parametrize(
    "script",
    [
        "kill -SEGV $$",
        "kill -KILL $$",
        "exit 1",
        "exit 0",
        "echo '[[['",
        "echo '{\"manifest\": 1}'",
        "head -c 9000000 /dev/zero",
        f'ulimit -v 8000; exec "{sys.executable}" "$@"',
        f'ulimit -t 0; exec "{sys.executable}" "$@"',
    ],
)
def test_a_child_that_dies_or_babbles(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_is(script, tmp_path, monkeypatch)
    with pytest.raises(PluginError) as caught:
        inspect(SOUND.encode(), "p.py", NOTHING)
    assert "30 s of processor time" in caught.value.message
    assert "2048 MiB" in caught.value.message
    assert caught.value.hint


def test_a_child_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child_is("exec sleep 600", tmp_path, monkeypatch)
    monkeypatch.setattr(gatekeeper, "WALL_SECONDS", 0.01)
    with pytest.raises(PluginError, match="took more than"):
        inspect(SOUND.encode(), "p.py", NOTHING)


def test_a_child_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(PluginError, match=r"p.py: .*: No such file") as caught:
        inspect(SOUND.encode(), "p.py", NOTHING)
    assert caught.value.hint


def test_the_child_inherits_no_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = sys.executable
    child_is(f'env > "{tmp_path}/env"; exec "{interpreter}" "$@"', tmp_path, monkeypatch)
    monkeypatch.setenv("HOSTPW", "hunter2")
    assert inspect(SOUND.encode(), "p.py", NOTHING).findings == []
    assert "HOSTPW" not in (tmp_path / "env").read_text()


def test_limits_are_lowered_and_never_raised() -> None:
    code = (
        "import resource as r\n"
        "from casparian_flow.security.gatekeeper_child import lower\n"
        "lower(r.RLIMIT_NOFILE, 50); lower(r.RLIMIT_NOFILE, 60)\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(50, 50)\n"
