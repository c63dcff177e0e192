"""A MANIFEST is read without running the plugin; what is not one is refused in words."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from casparian_flow.db.plugins import manifest_of
from casparian_flow.errors import PluginError
from casparian_flow.sdk import PluginMetadata
from casparian_flow.security.manifest import SOURCE_LIMIT, Manifest, read_manifest

IMPORT = "from casparian_flow.sdk import BasePlugin, PluginMetadata\n"
HANDLER = textwrap.dedent("""
    class Handler(BasePlugin):
        def execute(self, file_path):
            self.publish("sales", file_path)
""")
SOUND = f"{IMPORT}MANIFEST = PluginMetadata(pattern=['*.csv', 'a'], priority=-1)\n{HANDLER}"


def read(
    arguments: str, *, before: str = "", handler: str = HANDLER, name: str = "p.py"
) -> Manifest:
    source = f"{IMPORT}{before}MANIFEST = PluginMetadata({arguments})\n{handler}"
    return read_manifest(source.encode(), name)


def refusal(source: str | bytes, name: str = "p.py") -> PluginError:
    with pytest.raises(PluginError) as caught:
        read_manifest(source.encode() if isinstance(source, str) else source, name)
    assert caught.value.hint
    return caught.value


def refused(arguments: str, *, before: str = "", handler: str = HANDLER) -> PluginError:
    return refusal(f"{IMPORT}{before}MANIFEST = PluginMetadata({arguments})\n{handler}")


def test_a_whole_manifest() -> None:
    assert read(
        """
        pattern=["*.csv", "2024/**/*.tsv"], topic=("sales", "returns"), priority=-5,
        subscriptions=["csv", "finance"], name="daily.sales", version="v1.0-beta",
        sinks={"returns": "parquet://out", "audit": "sqlite:///a.sqlite3"}, timeout_seconds=1.5,
        """
    ) == Manifest(
        name="daily.sales",
        version="1.0b0",
        patterns=["*.csv", "2024/**/*.tsv"],
        topics=["sales", "returns", "audit"],
        priority=-5,
        subscriptions=["csv", "finance"],
        sinks={"returns": "parquet://out", "audit": "sqlite:///a.sqlite3"},
        timeout_seconds=1.5,
    )


def test_the_smallest_manifest_is_named_after_its_file_and_may_publish_nothing() -> None:
    assert read("pattern='*'", name="sales-2024.py") == Manifest(
        name="sales-2024",
        version="",
        patterns=["*"],
        topics=[],
        priority=0,
        subscriptions=[],
        sinks={},
        timeout_seconds=0.0,
    )


def test_none_is_the_default() -> None:
    fields = [field.name for field in dataclasses.fields(PluginMetadata)]
    given_none = ", ".join(f"{name}=None" for name in fields if name != "pattern")
    assert read(f"pattern='*', {given_none}") == read("pattern='*'")


def test_every_field_of_the_sdk_is_known_and_no_other() -> None:
    names = [field.name for field in dataclasses.fields(PluginMetadata)]
    assert refused("zzz=1").message.endswith(f"the fields are {', '.join(names)}")


def test_options_are_literals_by_name() -> None:
    assert read(
        "pattern='*', options={'delimiter': '\\x01', 'line': 2, 'strict': True}"
    ).options == {
        "delimiter": "\x01",
        "line": 2,
        "strict": True,
    }
    assert "options must be" in refused("pattern='*', options={'line': 1.5}").message
    assert "not an option's name" in refused("pattern='*', options={'A b': 1}").message
    assert "not Unicode" in refused(r"pattern='*', options={'a': '\ud800'}").message


def test_a_contract_is_any_literal_that_json_can_hold() -> None:
    contract = {
        "language": 1, "table": "sales", "files": ["*.csv"], "lines": False,
        "columns": [{"name": "ä", "type": "double", "minimum": -1.5, "enum": [0.25, 2]}],
    }  # fmt: skip
    manifest = read(f"pattern='*', contract={contract!r}, catch_all=True")
    assert manifest.contract == contract
    assert manifest.is_table
    assert not manifest.yields_to_tables
    surveying = read("pattern='*', contract={'survey': {'tokens': ('', {'-'})}}")
    assert surveying.contract == {"survey": {"tokens": ["", ["-"]]}}
    assert not surveying.is_table
    assert not surveying.yields_to_tables
    assert manifest_of(msgspec.json.encode(manifest)) == manifest


def test_a_catch_all_without_a_contract_yields_to_tables() -> None:
    assert read("pattern='*', catch_all=True, contract={}").yields_to_tables
    assert not read("pattern='*'").yields_to_tables
    assert refused("pattern='*', catch_all=1").message.endswith(
        "catch_all must be True or False, not 1"
    )


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        ("'sales'", "contract must be a dict"),
        ("open('/etc/passwd')", "is computed"),
        ("{'a': [x for x in 'ab']}", "is computed"),
        ("{**{}}", "is computed"),
        ("{'a': f'{1}'}", "is computed"),
        ("{'columns': {'a': 'text', 'b': 'text', 'a': 'date'}}", "has 'a' twice"),
        ("{1: 'a'}", "a key that is no string"),
        ("{'a': b'x'}", "a value of the type bytes"),
        ("{'a': 1j}", "a value of the type complex"),
        ("{'a': ...}", "a value of the type ellipsis"),
        ("{'a': 1e999}", "not finite"),
        ("{'a': 9223372036854775808}", "more than 64 bits"),
        (r"{'a': '\ud800'}", "not Unicode"),
        (r"{'\ud800': 1}", "not Unicode"),
        ("{'a': " + "[" * 90 + "]" * 90 + "}", "nested more than"),
        ("{'a': [" + "0," * 50_000 + "]}", "more than 50000 values"),
        ("{'a': '" + "x" * 300_000 + "'}", "262144 characters"),
        ("{'table': 'sales', 'files': ['*'], 'columns': {'a': 'money'}}", "column a"),
        ("{'survey': 1}", "must be a mapping"),
    ],
)
def test_a_hostile_contract_is_refused_in_words(contract: str, words: str) -> None:
    assert words in refused(f"pattern='*', contract={contract}").message


def test_nothing_of_the_plugin_is_run() -> None:
    read("pattern='*'", before="raise SystemExit('ran')\n")


@pytest.mark.parametrize(
    "opening",
    [
        "from casparian_flow.sdk import PluginMetadata\nMANIFEST = PluginMetadata(",
        "from casparian_flow.sdk import PluginMetadata\nMANIFEST: PluginMetadata = PluginMetadata(",
        "from casparian_flow.sdk import PluginMetadata as About\nMANIFEST = About(",
        "from casparian_flow.sdk import *\nMANIFEST = PluginMetadata(",
        "from casparian_flow import sdk\nMANIFEST = sdk.PluginMetadata(",
        "from casparian_flow import sdk as kit\nMANIFEST = kit.PluginMetadata(",
        "import casparian_flow.sdk as kit\nMANIFEST = kit.PluginMetadata(",
        "import casparian_flow.sdk\nMANIFEST = casparian_flow.sdk.PluginMetadata(",
        "from casparian_flow.sdk import PluginMetadata\nif True:\n  MANIFEST = PluginMetadata(",
        "\ufeff# coding: utf-8\r\nMANIFEST = PluginMetadata(",
    ],
)
def test_ways_to_write_the_call(opening: str) -> None:
    source = f"{opening}pattern='*.csv', topic='sales')\nfrom elsewhere import Handler\n"
    assert read_manifest(source.encode(), "p.py").patterns == ["*.csv"]


@pytest.mark.parametrize(
    ("written", "patterns"),
    [
        ("'*.csv'", ["*.csv"]),
        ("('*' '.csv')", ["*.csv"]),
        ("['b', 'a', 'b']", ["b", "a"]),
        ("('b', 'a')", ["b", "a"]),
        ("{'b', 'a', 'c'}", ["b", "a", "c"]),
        ("'näme *.csv'", ["näme *.csv"]),
    ],
)
def test_ways_to_write_patterns(written: str, patterns: list[str]) -> None:
    assert read(f"pattern={written}").patterns == patterns


@pytest.mark.parametrize(
    "handler",
    [
        "Handler = make()",
        "Handler: type = make()",
        "from elsewhere import Handler",
        "from elsewhere import Reader as Handler",
        "try:\n  from fast import Handler\nexcept ImportError:\n  from slow import Handler",
        "class Handler(CsvPlugin): pass",
        "class Handler(Mixin, BasePlugin): pass",
        "class Handler(make()): pass",
        "class Handler(BasePlugin):\n  execute = read",
        "class Handler(BasePlugin):\n  if True:\n    def execute(self, file_path): pass",
    ],
)
def test_ways_to_have_a_handler(handler: str) -> None:
    read("pattern='*'", handler=handler)


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("", "p.py has no class Handler"),
        ("class handler(BasePlugin): pass", "p.py has no class Handler"),
        ("def f():\n  class Handler(BasePlugin): pass", "p.py has no class Handler"),
        ("class Handler: pass", "line 3: class Handler does not derive from BasePlugin"),
        ("class Handler(BasePlugin): pass", "line 3: class Handler has no method execute"),
        ("class Handler(sdk.BasePlugin): pass", "line 3: class Handler has no method execute"),
        (
            "class Handler(BasePlugin):\n  def run(self):\n    execute = 1",
            "line 3: class Handler has no method execute",
        ),
    ],
)
def test_without_a_handler_that_can_run(handler: str, says: str) -> None:
    error = refused("pattern='*'", handler=handler)
    assert says in error.message
    assert "class Handler(BasePlugin)" in error.hint


def test_an_aliased_base_is_known() -> None:
    before = "from casparian_flow.sdk import BasePlugin as Base\n"
    assert (
        "no method execute" in refused("", before=before, handler="class Handler(Base): 1").message
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "p.py has no MANIFEST"),
        ("def f():\n  MANIFEST = PluginMetadata()", "p.py has no MANIFEST"),
        ("MANIFEST: PluginMetadata", "p.py has no MANIFEST"),
        ("MANIFEST = make()", "line 1: `make()` is computed; use a literal"),
        ("MANIFEST = make()()", "line 1: `make()()` is computed; use a literal"),
        ("MANIFEST = {'pattern': '*'}", "line 1: `{'pattern': '*'}` is computed"),
        ("import x\nfrom x import MANIFEST", "line 2: `from x import MANIFEST` is computed"),
        ("MANIFEST = f(\n  1)", "line 1: `f(...` is computed"),
        ("MANIFEST = PluginMetadata()\nMANIFEST = 1", "line 2: MANIFEST"),
        ("MANIFEST = PluginMetadata('*')", "line 1: MANIFEST's fields must be named"),
        ("MANIFEST = PluginMetadata(*a)", "line 1: MANIFEST's fields must be named"),
        ("MANIFEST = PluginMetadata(**kw)", "line 1: `**kw` is computed; use a literal"),
    ],
)
def test_a_manifest_that_cannot_be_read(source: str, says: str) -> None:
    assert says in refusal(source).message


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (
            "patern='*'",
            "line 2: MANIFEST has no field 'patern'; the fields are pattern",
            "pattern?",
        ),
        ("topics='a'", "MANIFEST has no field 'topics'", "did you mean topic?"),
        ("xyzzy=1", "MANIFEST has no field 'xyzzy'", "remove it"),
        ("pattern='a', pattern='b'", "line 2: MANIFEST has pattern twice", "keep one"),
        ("pattern=glob()", "line 2: `glob()` is computed; use a literal", "PluginMetadata("),
        ("pattern=['a', X]", "line 2: `X` is computed; use a literal", ""),
        ("pattern='a' + 'b'", "line 2: `'a' + 'b'` is computed; use a literal", ""),
        ("pattern=f'{x}'", "`f'{x}'` is computed; use a literal", ""),
        ("priority=+1", "`+1` is computed; use a literal", ""),
        ("sinks={'a': uri()}", "`uri()` is computed; use a literal", ""),
        ("sinks={**a}", "`{**a}` is computed; use a literal", ""),
        ("sinks={[]: 'a'}", "`{[]: 'a'}` is computed; use a literal", ""),
        ("pattern=a" + "b" * 99, f"`a{'b' * 59}...` is computed", ""),
        ("pattern=[\n\n  x()]", "line 4: `x()` is computed", ""),
    ],
)
def test_an_argument_that_cannot_be_read(arguments: str, says: str, hint: str) -> None:
    error = refused(arguments)
    assert says in error.message
    assert hint in error.hint


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("priority='high'", "priority must be a whole number (of 9 digits at most), not 'high'"),
        ("priority=1.5", "priority must be a whole number"),
        ("priority=True", "priority must be a whole number"),
        ("priority=-10_000_000_000", "priority must be a whole number"),
        ("priority=0x" + "f" * 9999, "priority must be a whole number"),
        ("pattern=1", "pattern must be a string or a list of strings, not 1"),
        ("pattern=b'*'", "pattern must be a string or a list of strings, not b'*'"),
        ("pattern=['a', 1]", "pattern must be a string or a list of strings, not ['a', 1]"),
        ("pattern=[['a']]", "pattern must be a string or a list of strings, not [['a']]"),
        ("topic={}", "topic must be a string or a list of strings, not {}"),
        ("subscriptions=...", "subscriptions must be a list of strings, not ..."),
        (
            "sinks='parquet://out'",
            "sinks must be a dict of strings, topic to sink URI or a list of them, not",
        ),
        ("sinks={'a': None}", "sinks must be a dict of strings"),
        ("sinks={1: 'a'}", "sinks must be a dict of strings"),
        ("sinks={'a': ['b', 1]}", "sinks must be a dict of strings"),
        ("name=7", "name must be a string, not 7"),
        ("version=1.0", "version must be a string, not 1.0"),
        ("timeout_seconds='1'", "timeout_seconds must be a number of seconds, 0 or more, not '1'"),
        ("timeout_seconds=-1", "timeout_seconds must be a number of seconds, 0 or more, not -1"),
        ("timeout_seconds=1e999", "timeout_seconds must be a number"),
        ("timeout_seconds=2j", "timeout_seconds must be a number"),
        ("timeout_seconds=False", "timeout_seconds must be a number"),
    ],
)
def test_a_value_of_the_wrong_type(argument: str, says: str) -> None:
    assert f"p.py line 2: {says}" in refused(argument).message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "MANIFEST has no pattern"),
        ("pattern=None", "MANIFEST has no pattern"),
        ("pattern=[]", "MANIFEST has no pattern"),
        ("pattern=''", "pattern '' is empty"),
        ("pattern=['*', ' ']", "pattern ' ' is empty"),
        ("pattern='a\\0'", "pattern 'a\\x00' is empty or has control characters"),
        ("pattern='\\ud800'", "pattern '\\ud800' is empty or has control characters"),
        ("pattern='/etc/*'", "pattern '/etc/*' leads out of the source root"),
        ("pattern='a/../../b'", "pattern 'a/../../b' leads out of the source root"),
        ("pattern='*', topic=''", "topic '' is not a topic's name"),
        ("pattern='*', topic='_hidden'", "topic '_hidden' is not a topic's name"),
        ("pattern='*', topic='.hidden'", "topic '.hidden' is not a topic's name"),
        ("pattern='*', topic='a/b'", "topic 'a/b' is not a topic's name"),
        ("pattern='*', topic='sales\\n'", "topic 'sales\\n' is not a topic's name"),
        ("pattern='*', topic='ä'", "topic 'ä' is not a topic's name"),
        ("pattern='*', topic='" + "a" * 65 + "'", "is not a topic's name"),
        ("pattern='*', sinks={'a b': 'parquet://o'}", "topic 'a b' is not a topic's name"),
        ("pattern='*', sinks={'a': ''}", "sink '' is empty"),
        ("pattern='*', sinks={'a': []}", "topic 'a' has an empty list of sinks"),
        (
            "pattern='*', sinks={'a': 'parquet://o?compression=zstd'}",
            "topic 'a': sink 'parquet://o' has no option 'compression'; there is: mode",
        ),
        (
            "pattern='*', sinks={'a': ['parquet://o', 'sqlite:///t?mode=upsert']}",
            "topic 'a': sink 'sqlite:///t' has no mode 'upsert'; there are: append, replace, error",
        ),
        (
            "pattern='*', sinks={'a': 'parquet://o?mode=error&mode=error'}",
            "topic 'a': sink 'parquet://o' gives mode twice",
        ),
        ("pattern='*', sinks={'a': 'parquet://o?'}", "has no option ''"),
        ("pattern='*', sinks={'a': 'parquet://o?mode'}", "has no mode ''"),
        ("pattern='*', subscriptions=['']", "subscription '' is empty"),
        ("pattern='*', subscriptions='a,b'", "subscription 'a,b' has a comma in it"),
        ("pattern='*', name='../up'", "name '../up' is not a name"),
        ("pattern='*', name='..'", "name '..' is not a name"),
        ("pattern='*', name='-x'", "name '-x' is not a name"),
        ("pattern='*', name='" + "a" * 65 + "'", "is not a name"),
        ("pattern='*', version='newest'", "version 'newest' is not a version of PEP 440"),
        ("pattern='*', version='" + "1." * 32 + "1'", "is not a version of PEP 440"),
    ],
)
def test_a_value_that_cannot_be_used(arguments: str, says: str) -> None:
    assert says in refused(arguments).message


def test_a_topic_may_have_several_sinks() -> None:
    manifest = read(
        "pattern='*', topic='c', "
        "sinks={'a': ['parquet://o', 'sqlite:///t?mode=replace'], 'b': 'parquet://o'}"
    )
    assert manifest.topics == ["c", "a", "b"]
    assert manifest.sinks_of("a") == ["parquet://o", "sqlite:///t?mode=replace"]
    assert manifest.sinks_of("b") == ["parquet://o"]
    assert manifest.sinks_of("c") == []


@pytest.mark.parametrize(
    "sink",
    ["mssql://sa:hunter2@host/db", "mssql://Server=host;Pwd=hunter2", "mssql://t?password=hunter2"],
)
def test_a_connection_or_a_secret_is_refused_and_not_repeated(sink: str) -> None:
    error = refused(f"pattern='*', sinks={{'a': {sink!r}}}")
    assert "hunter2" not in error.message + error.hint
    assert "topic 'a'" in error.message


def test_a_manifest_of_an_earlier_release_is_read_as_it_is_written_now() -> None:
    """Else what is deployed would not be what its source says, and run no more."""
    stored = (
        '{"name":"p","version":"","patterns":["*"],"topics":["a"],"priority":0,'
        '"subscriptions":[],"sinks":{"a":"parquet://o"},"timeout_seconds":0.0}'
    )
    assert manifest_of(stored) == read("pattern='*', sinks={'a': 'parquet://o'}")


def test_a_files_name_that_cannot_name_a_plugin() -> None:
    error = refusal(SOUND, "sales report.py")
    assert "the plugin's name 'sales report' is not a name" in error.message
    assert 'name="..."' in error.hint


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"import x\nclass Handler(:\n", "p.py line 2: invalid syntax: class Handler(:"),
        (b"x = '\x1b[2J\n", "(detected at line 1): x = '?["),
        (b"x = '\xff'\n", "p.py: invalid or missing encoding declaration"),
        (b"#\n#\nx = '\xff'\n", "codec can't decode byte 0xff"),
        (b"#\n#\nx = $\xff\n", "codec can't decode byte 0xff"),
        (b"# coding: klingon\n", "p.py: unknown encoding: klingon"),
        (b"# coding: latin-1\nx = '\xe4'\n", "its encoding is iso-8859-1, not UTF-8"),
        (b"# coding: punycode\n", "its encoding is punycode, not UTF-8"),
        ("x = 1".encode("utf-16"), "p.py has NUL bytes"),
        (b"x = 1\0", "p.py has NUL bytes"),
        (b"#" * (SOURCE_LIMIT + 1), "p.py has 1048577 bytes"),
        (b"x = " + b"(" * 1000, "p.py line 1: too many nested parentheses"),
        (b"x = " + b"-" * 100_000 + b"1", "p.py nests expressions too deeply"),
        (b"x = a" + b".a" * 100_000, "p.py nests expressions too deeply"),
        (b"x = " + b"1+" * 100_000 + b"1", "p.py nests expressions too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_source_that_python_cannot_read(source: bytes, says: str) -> None:
    assert says in refusal(source).message


def test_a_long_chain_of_elif_is_read() -> None:
    branches = "".join(f"elif x == {n}:\n  y = {n}\n" for n in range(300))
    assert read("pattern='*'", before=f"if x:\n  y = 0\n{branches}").patterns == ["*"]


def test_an_invalid_escape_is_between_the_author_and_python() -> None:
    assert read("pattern='*'", before="import re\nDIGITS = re.compile('\\d')\n").patterns == ["*"]


@given(st.binary())
@example(b"# coding: undefined\n")
@example(b"# coding: rot13\n")
@example(b"\xef\xbb\xbf# coding: latin-1\n")
@example(b"\xff\xfe")
def test_any_bytes_are_a_plugin_or_an_error_of_ours(source: bytes) -> None:
    try:
        read_manifest(source, "p.py")
    except PluginError as error:
        assert error.hint


places = st.integers(0, len(SOUND))


@given(places, places, st.binary(max_size=6) | st.sampled_from([b"(", b"'", b'"""', b"\\", b"\r"]))
def test_a_plugin_with_a_hole_in_it_is_a_plugin_or_an_error_of_ours(
    start: int, end: int, filling: bytes
) -> None:
    try:
        read_manifest(SOUND[:start].encode() + filling + SOUND[end:].encode(), "p.py")
    except PluginError as error:
        assert error.hint


strings = st.text("ab*/.,\n\0\ud800é ", max_size=5)
literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(strings, inner, max_size=3)
    ),
    max_leaves=5,
).map(repr)
expressions = st.sampled_from(["x", "f()", "-x", "{*a}", "lambda: 0", "'' % ()"]) | literals
fields = st.sampled_from([field.name for field in dataclasses.fields(PluginMetadata)])


@given(st.dictionaries(fields | st.just("other"), expressions))
def test_any_arguments_make_a_sound_manifest_or_an_error_of_ours(arguments: dict[str, str]) -> None:
    try:
        manifest = read(", ".join(f"{name}={value}" for name, value in arguments.items()))
    except PluginError as error:
        assert error.hint
    else:
        assert manifest.patterns
        assert set(manifest.sinks) <= set(manifest.topics)


texts = st.lists(st.text("ab*é", min_size=1, max_size=9), unique=True, min_size=1)
topics = st.lists(st.text("aB1_.-", max_size=63).map("t{}".format))


@given(
    st.fixed_dictionaries(
        {"pattern": texts},
        optional={
            "topic": topics,
            "priority": st.integers(-999_999_999, 999_999_999),
            "subscriptions": texts,
            "timeout_seconds": st.floats(0, 1e8),
        },
    )
)
def test_what_is_written_is_what_is_read(values: dict[str, Any]) -> None:
    manifest = read(", ".join(f"{name}={value!r}" for name, value in values.items()))
    about = PluginMetadata(**values)
    assert manifest.patterns == list(about.pattern)
    assert manifest.topics == list(dict.fromkeys(about.topic))
    assert manifest.priority == about.priority
    assert manifest.subscriptions == list(about.subscriptions)
    assert manifest.timeout_seconds == about.timeout_seconds
