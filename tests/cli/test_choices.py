"""One plugin file becomes several plugins: what is chosen on the command line runs."""

from __future__ import annotations

from tests.commands import Casparian, add_source, asked, holds

SPLITS = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(
    pattern="*.txt",
    topic=["parts", "parts_rest"],
    options={"delimiter": ",", "skip": 0, "upper": False},
    version="1.0.0",
)

class Handler(BasePlugin):
    def execute(self, file_path: str):
        options = MANIFEST.options
        with open(file_path, encoding="utf-8") as file:
            lines = file.read().splitlines()[options["skip"]:]
        parts = [part for line in lines for part in line.split(options["delimiter"])]
        if options["upper"]:
            parts = [part.upper() for part in parts]
        self.publish(MANIFEST.topic[0], pa.table({"line": parts}))
        self.publish(MANIFEST.topic[1], pa.table({"n": [len(parts)]}))
"""


def test_one_file_is_published_as_two_plugins(casparian: Casparian) -> None:
    inbox = add_source(casparian)
    (inbox / "a.txt").write_text("a,b\tc\nd\te\n")
    (inbox / "b.tsv").write_text("x\ty,z\nlast\n")
    file = casparian.plugin("splits", SPLITS)
    first = casparian.run("publish", file)
    assert "options      delimiter=',', skip=0, upper=False" in first.stderr
    choices = [
        "--name", "tabs", "--pattern", "*.tsv", "--pattern", "a.*", "--topic", "tabs",
        "--topic", "tabs_rest", "--option", r"delimiter=\t", "--option", "skip=1",
        "--option", "upper=yes",
    ]  # fmt: skip
    second = casparian.run("publish", file, *choices)
    assert "patterns     *.tsv, a.*\ntopics       tabs, tabs_rest\n" in second.stderr
    assert "deployed tabs 1.0.0" in second.stdout
    assert r"options      delimiter='\t', skip=1, upper=True" in second.stderr
    assert file.read_text() == SPLITS
    casparian.run("scan", "--drain")
    assert asked(casparian, "parts") == ["a", "b\tc", "d\te"]
    assert asked(casparian, "tabs") == ["D", "E", "LAST"]
    assert [row["n"] for row in casparian.json("query", "SELECT n FROM tabs_rest ORDER BY n")] == [
        1, 2,
    ]  # fmt: skip

    shown = casparian.json("plugins", "show", "tabs", "--source")
    assert shown["manifest"]["options"] == {"delimiter": "\t", "skip": 1, "upper": True}
    assert r'"delimiter": "\t", "skip": 1, "upper": True' in shown["source"]
    text = casparian.out("plugins", "show", "tabs")
    assert "\noptions\n" in text
    assert "skip       1" in text

    again = casparian.run("publish", file, *choices)
    assert "tabs 1.0.0 is already deployed" in again.stdout
    other = casparian.run("publish", file, *choices, "--option", "skip=0", code=2)
    assert "--option skip is given twice" in other.stderr
    changed = casparian.run("publish", file, "--name", "tabs", code=65)
    assert "publish with --version 1.0.1" in changed.stderr
    holds(casparian)


def test_what_the_plugin_does_not_have_is_refused(casparian: Casparian) -> None:
    file = casparian.plugin("splits", SPLITS)
    assert "no option 'delimeter'" in casparian.err(
        "publish", file, "--option", "delimeter=;", code=65
    )
    assert "KEY=VALUE" in casparian.err("publish", file, "--option", "skip", code=2)
    assert "has 2: parts, parts_rest" in casparian.err("publish", file, "--topic", "one", code=65)
    assert casparian.json("plugins") == []
