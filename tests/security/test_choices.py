"""What a person chooses when they publish is put into the MANIFEST's source; the rest stays."""

from __future__ import annotations

import ast
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casparian_flow.errors import PluginError
from casparian_flow.sdk import PluginMetadata
from casparian_flow.security.choices import Choices, choose
from casparian_flow.security.manifest import Manifest, read_manifest

HEAD = '"""Ünïcode, und \\t."""\nfrom casparian_flow.sdk import BasePlugin, PluginMetadata\n\n'
HANDLER = """

class Handler(BasePlugin):
    def execute(self, file_path):
        self.publish(MANIFEST.topic[0], file_path)
"""


def plugin(call: str, handler: str = HANDLER) -> bytes:
    return f"{HEAD}MANIFEST = PluginMetadata({call}){handler}".encode()


def chosen(source: bytes, **choices: Any) -> Manifest:
    return read_manifest(choose(source, "p.py", Choices(**choices)).source, "p.py")


def refusal(source: bytes, **choices: Any) -> PluginError:
    with pytest.raises(PluginError) as caught:
        choose(source, "p.py", Choices(**choices))
    assert caught.value.hint
    return caught.value


# Property -----------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
GLOBS = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not text.startswith("/") and ".." not in text.split("/")
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
KEYS = st.sampled_from(["delimiter", "header_line", "strict", "codec"])
VALUES = st.one_of(TEXTS, st.booleans(), st.integers(-(10**9) + 1, 10**9 - 1))
GAPS = st.sampled_from(["", " ", "\n", "  # ü, a comment ) ' \"\n    ", "\r\n\t", "\\\n  "])


@st.composite
def literals(draw: st.DrawFn, value: Any) -> str:
    """One way to write a value."""
    if isinstance(value, list):
        left, right = draw(st.sampled_from(["[]", "()"]))
        items = [draw(literals(item)) for item in value]
        comma = "," if items and (left == "(" or draw(st.booleans())) else ""
        gap = draw(GAPS)
        return f"{left}{gap}{f',{gap}'.join(items)}{comma}{draw(GAPS)}{right}"
    if isinstance(value, dict):
        gap = draw(GAPS)
        items = [f"{draw(literals(k))}:{gap}{draw(literals(v))}" for k, v in value.items()]
        return (
            "{"
            + gap
            + f", {gap}".join(items)
            + draw(st.sampled_from(["", ","] if items else [""]))
            + "}"
        )
    if isinstance(value, str):
        half = draw(st.integers(0, len(value)))
        return draw(
            st.sampled_from(
                [repr(value), ascii(value), f"({value!r})", f"{value[:half]!r} {value[half:]!r}"]
            )
        )
    return draw(st.sampled_from([repr(value), f"({value!r})", f"( \n{value!r})"]))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """The fields of a MANIFEST, and a plugin whose source says them in some way."""
    topics = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    fields: dict[str, Any] = {
        "pattern": draw(st.one_of(GLOBS, st.lists(GLOBS, min_size=1, max_size=3))),
        "topic": topics[0] if len(topics) == 1 and draw(st.booleans()) else topics,
    }
    more = {
        "name": NAMES,
        "version": st.just("1.2.0"),
        "priority": st.integers(-9, 9),
        "options": st.dictionaries(KEYS, VALUES),
        "sinks": st.dictionaries(
            st.sampled_from([*topics, "only.sunk"]),
            st.sampled_from(["parquet://out", ["parquet://a", "sqlite:///b?mode=replace"]]),
        ),
    }
    for field, values in more.items():
        if draw(st.booleans()):
            fields[field] = draw(values)
    order = draw(st.permutations(list(fields)))
    gap = draw(GAPS)
    said = f",{gap}".join(f"{field}{draw(GAPS)}={draw(literals(fields[field]))}" for field in order)
    call = f"{draw(GAPS)}{said}{draw(st.sampled_from(['', ',', ', # fmt: skip' + chr(10)]))}"
    bom = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return fields, bom + plugin(call)


@st.composite
def typed(draw: st.DrawFn, declared: object) -> tuple[str, object]:
    """A value of the type of `declared`, as it is typed and as it is meant."""
    if isinstance(declared, bool):
        return draw(st.sampled_from([("true", True), ("NO", False), ("1", True), ("off", False)]))
    if isinstance(declared, int):
        value = draw(st.integers(-(10**9) + 1, 10**9 - 1))
        return str(value), value
    text = draw(TEXTS)
    escaped = "".join(
        draw(st.sampled_from([c, f"\\U{ord(c):08x}"])) if c != "\\" else "\\\\" for c in text
    )
    return escaped, text


def values_of(source: bytes) -> tuple[list[str], dict[str, str]]:
    """The statements beside the MANIFEST, and the MANIFEST's fields, as syntax trees."""
    tree = ast.parse(source)
    (call,) = [
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
    ]  # fmt: skip
    others = [ast.dump(node) for node in tree.body if getattr(node, "value", None) is not call]
    return others, {str(k.arg): ast.dump(k.value) for k in call.keywords}


@settings(suppress_health_check=[HealthCheck.too_slow])  # whole manifests are many draws
@given(st.data())
@pytest.mark.slow
def test_what_was_chosen_reads_back_and_nothing_else_changes(data: st.DataObject) -> None:
    fields, source = data.draw(calls())
    before = read_manifest(source, "p.py")
    name = data.draw(st.none() | NAMES)
    patterns = data.draw(st.lists(GLOBS, max_size=3, unique=True))
    topics = data.draw(
        st.just([])
        | st.lists(NAMES, min_size=len(before.topics), max_size=len(before.topics), unique=True)
    )
    options = {}
    for key in (
        data.draw(st.sets(st.sampled_from(sorted(before.options)))) if before.options else ()
    ):
        options[key] = data.draw(typed(before.options[key]))
    choices = Choices(name, patterns, topics, {key: text for key, (text, _) in options.items()})
    after = choose(source, "p.py", choices).source

    renamed = dict(zip(before.topics, topics or before.topics, strict=True))
    wanted = msgspec.structs.replace(
        before,
        name=name or before.name,
        patterns=patterns or before.patterns,
        topics=[renamed[topic] for topic in before.topics],
        sinks={renamed[topic]: sink for topic, sink in before.sinks.items()},
        options={**before.options, **{key: value for key, (_, value) in options.items()}},
    )
    found = read_manifest(after, "p.py")
    assert found == wanted
    assert {k: type(v) for k, v in found.options.items()} == {
        k: type(v) for k, v in before.options.items()
    }

    others, said = values_of(source)
    others_after, said_after = values_of(after)
    assert others_after == others
    touched = {"name"} if name else set()
    touched |= {"pattern"} if patterns else set()
    touched |= {"topic", "sinks"} if topics else set()
    touched |= {"options"} if options else set()
    assert {k: v for k, v in said_after.items() if k not in touched} == {
        k: v for k, v in said.items() if k not in touched
    }
    head, tail = source.partition(b"PluginMetadata(")[0], source.rpartition(b")\n\nclass")[2]
    assert after.startswith(head)
    assert after.endswith(tail)
    if not any(choices):
        assert after == source

    # Python itself reads what we read, in the form that the plugin's code expects.
    names: dict[str, Any] = {"PluginMetadata": PluginMetadata, "BasePlugin": object}
    exec(compile(after, "p.py", "exec"), names)
    ran = names["MANIFEST"]
    assert (
        [ran.topic]
        if isinstance(ran.topic, str)
        else list(ran.topic) == found.topics[: len(ran.topic)]
    )
    assert isinstance(ran.topic, str) == isinstance(fields["topic"], str)
    assert dict(ran.options) == found.options


# Cases --------------------------------------------------------------------------------------

LAID_OUT = """
    pattern=["*.csv", "*.tsv"],  # both
    topic=["rows", "rows_rejects"],
    sinks={"rows": "parquet://out", "seen": "parquet://seen"},
    options={"delimiter": "", "header_line": 0, "strict": False},
    version="1.0.0",
"""


def test_a_manifest_on_several_lines_keeps_its_form() -> None:
    options = {"delimiter": r"\t", "header_line": "3"}
    choices = Choices("orders", ["o*.csv"], ["orders", "bad", "seen"], options)
    assert choose(plugin(LAID_OUT), "p.py", choices).source == plugin(
        r"""
    name="orders",
    pattern=["o*.csv"],  # both
    topic=["orders", "bad"],
    sinks={"orders": "parquet://out", "seen": "parquet://seen"},
    options={"delimiter": "\t", "header_line": 3, "strict": False},
    version="1.0.0",
"""
    )


@pytest.mark.parametrize(
    ("call", "choices", "wanted"),
    [
        ('pattern="*"', {"name": "n"}, 'name="n", pattern="*"'),
        ('\n\tpattern="*"\n', {"name": "n"}, '\n\tname="n",\n\tpattern="*"\n'),
        ('\r\n  pattern="*",\r\n', {"name": "n"}, '\r\n  name="n",\r\n  pattern="*",\r\n'),
        ("", {"patterns": ["*.csv"]}, 'pattern="*.csv"'),
        ("  # none\n", {"patterns": ["*", "b"], "name": "n"},
         '  # none\nname="n", pattern=["*", "b"]'),
        ("pattern=None, name=None", {"patterns": ["*"], "name": "n"}, 'pattern="*", name="n"'),
        ('pattern=("*")', {"patterns": ["é", "b"]}, 'pattern=(["é", "b"])'),
        ('pattern="é" "é", name="ab"', {"name": "n"}, 'pattern="é" "é", name="n"'),
        ('pattern="*", topic=("a",)', {"topics": ["b"]}, 'pattern="*", topic=("b",)'),
        ('pattern="*", options={"q": \'"\'}', {"options": {"q": "'"}},
         'pattern="*", options={"q": "\'"}'),
        ('pattern="*", options={"q": 1, "q": -2}', {"options": {"q": "-7"}},
         'pattern="*", options={"q": -7, "q": -7}'),
    ],
)  # fmt: skip
def test_the_source_that_is_written(call: str, choices: dict[str, Any], wanted: str) -> None:
    assert choose(plugin(call), "p.py", Choices(**choices)).source == plugin(wanted)


CONTRACT = {
    "language": 1,
    "table": "sales",
    "files": ["s*"],
    "lines": False,
    "columns": [
        {"name": "order", "type": "integer", "required": True, "missingValues": ["", "k.A.", '"']},
        {"name": "day", "type": "date", "format": "%d.%m.%Y"},
    ],
}


SURVEY = {"survey": {"tokens": ["ü", {"b": [1, -2.5, True, None]}]}}


def test_a_contract_is_laid_out_with_a_line_for_each_column() -> None:
    call = '\n    pattern="*",\n    topic=["rows", "rows_rejects"],\n    catch_all=True,\n'
    sinks = {"sales": ["parquet://output?mode=replace"]}
    choices = Choices(
        "sales", ["s*"], ["sales", "sales_rejects"], {}, contract=CONTRACT, sinks=sinks
    )
    assert choose(plugin(call), "p.py", choices).source == plugin(
        """
    name="sales",
    contract={
        "language": 1,
        "table": "sales",
        "files": ["s*"],
        "lines": False,
        "columns": [
            {
                "name": "order",
                "type": "integer",
                "required": True,
                "missingValues": ["", "k.A.", '"'],
            },
            {"name": "day", "type": "date", "format": "%d.%m.%Y"},
        ],
    },
    sinks={"sales": ["parquet://output?mode=replace"]},
    pattern="s*",
    topic=["sales", "sales_rejects"],
    catch_all=True,
"""
    )


@pytest.mark.parametrize(
    "call", ['pattern="*"', 'pattern="*", contract={}', "pattern='*',contract=None"]
)
def test_a_contract_takes_the_place_of_another(call: str) -> None:
    once = choose(plugin(call), "p.py", Choices(contract=SURVEY)).source
    assert read_manifest(once, "p.py").contract == SURVEY
    again = chosen(once, contract=CONTRACT)
    assert again.contract == CONTRACT
    assert again.is_table


def test_sinks_that_are_chosen_replace_the_authors_under_the_new_names() -> None:
    source = plugin('pattern="*", topic="a", sinks={"a": "parquet://x"}')
    manifest = chosen(source, topics=["b"], sinks={"b": ["sqlite:///t.db", "parquet://y"]})
    assert manifest.sinks == {"b": ["sqlite:///t.db", "parquet://y"]}
    assert manifest.topics == ["b"]


def test_a_contract_that_no_source_can_hold_is_refused() -> None:
    assert "computed" in refusal(plugin('pattern="*"'), contract={"a": float("inf")}).message
    assert "deep" in refusal(plugin('pattern="*"'), contract={"a": [[[[[[[[]]]]]]]]}).message


@pytest.mark.parametrize(
    ("typed_text", "value"),
    [
        (r"\t", "\t"), (r"\x01", "\x01"), (r"\0", "\0"), (r"\\t", r"\t"), ("\t", "\t"), ("", ""),
        (r"\u00e9", "é"), (r"\U0001f600", "😀"), ("'\"", "'\""), ("é|", "é|"), ("true", "true"),
        ("\u202e", "\u202e"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_escapes_in_a_text(typed_text: str, value: str) -> None:
    source = plugin("pattern='*', options={'d': ','}")
    assert chosen(source, options={"d": typed_text}).options == {"d": value}


@pytest.mark.parametrize(
    "text", [r"\d", "\\", r"\x1", r"\x", r"\u12", r"a\ b", "\\\n", r"\U00110000"]
)
def test_what_is_no_escape_is_refused(text: str) -> None:
    source = plugin("pattern='*', options={'d': ','}")
    assert "is not an escape" in refusal(source, options={"d": text}).message


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("delimeter", ";", 'delimiter="", header_line=0, strict=False'),
        ("header_line", "two", "whole number"),
        ("header_line", "1.0", "whole number"),
        ("header_line", "", "whole number"),
        ("header_line", "1_0", "whole number"),
        ("header_line", "9999999999", "whole number"),
        ("strict", "2", "true or false"),
        ("strict", "", "true or false"),
        ("delimiter", "\udc80", "not Unicode text"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(option: str, text: str, words: str) -> None:
    assert words in refusal(plugin(LAID_OUT), options={option: text}).message


def test_a_plugin_without_options_has_none_to_choose() -> None:
    assert "it has no options" in refusal(plugin("pattern='*'"), options={"a": "1"}).message


@pytest.mark.parametrize(
    ("topics", "words"),
    [
        (["one"], "has 3: rows, rows_rejects, seen"),
        (["a", "b", "c", "d"], "has 3"),
        (["a", "b", "a"], "'a' is given twice"),
        (["a", "b", "not a name"], "not a topic's name"),
    ],
)
def test_topics_that_do_not_fit_are_refused(topics: list[str], words: str) -> None:
    assert words in refusal(plugin(LAID_OUT), topics=topics).message


def test_a_plugin_that_publishes_nothing_has_no_topic_to_choose() -> None:
    assert "has 0: none" in refusal(plugin("pattern='*'"), topics=["a"]).message


@pytest.mark.parametrize("call", ['self.publish("rows", 1)', 'self.publish(data=1, topic="rows")'])
def test_a_topic_that_the_code_names_itself_is_not_renamed(call: str) -> None:
    handler = HANDLER.replace("self.publish(MANIFEST.topic[0], file_path)", call)
    source = plugin('pattern="*", topic="rows"', handler)
    error = refusal(source, topics=["orders"])
    assert "line 8 publishes to the topic 'rows'" in error.message
    assert chosen(source, topics=["rows"]).topics == ["rows"]


def test_a_text_that_was_a_topics_name_is_pointed_at() -> None:
    handler = HANDLER.replace("class Handler", 'ROWS = "rows"\nOTHER = "else"\n\nclass Handler')
    source = plugin('pattern="*", topic="rows"', handler)
    (note,) = choose(source, "p.py", Choices(topics=["o"])).notes
    assert "line 6 has the text 'rows'" in note


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "é", "a\nb"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    assert "name" in refusal(plugin("pattern='*'"), name=name).message


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a\0b", "\udc80"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    refusal(plugin("pattern='*'"), patterns=[pattern])


def test_nothing_chosen_is_the_file_itself_whatever_it_is() -> None:
    assert choose(b"not a plugin (", "p.py", Choices()).source == b"not a plugin ("
