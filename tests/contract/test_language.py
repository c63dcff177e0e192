"""What a contract may say, and what a person reads who wrote something else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow import contract
from casparian_flow.contract import ContractError, literal, read
from casparian_flow.services.table_documents import (
    from_toml,
    to_odcs,
    to_table_schema,
    to_toml,
)

SALES: dict[str, Any] = {
    "table": "sales",
    "files": ["sales_*.csv", "{region}/sales_{day:%Y-%m-%d}.csv"],
    "source": "inbox",
    "sinks": ["parquet://output?mode=replace"],
    "max_rejects": "1%",
    "lines": True,
    "key": ["order", "day"],
    "dialect": {
        "encoding": "cp1252", "delimiter": ";", "header": "^Auftrag;", "footer": "^Summe;",
        "control": r"^Summe;(?P<rows>\d+);(?P<sum_net_amount>[\d.,]+)",
    },
    "columns": {
        "order": {"type": "integer", "required": True, "unique": True},
        "net amount": {
            "type": "decimal(18, 2)", "decimalChar": ",", "groupChar": ".", "minimum": -0.5,
            "missingValues": ["", "k.A."], "maximum": 10**9,
        },
        "paid": {"type": "boolean", "trueValues": ["ja"], "falseValues": ["nein"]},
        "zip": "text",
        'a "quoted" name': {"type": "text", "pattern": r"[A-Z]{2}\d+", "minLength": 1},
        "due": {"type": "timestamp[tz]", "minimum": "2026-01-01T00:00:00+02:00"},
        "rate": {"type": "double", "enum": [0.5, 1]},
        "region": {"type": "text", "from": "path"},
        "day": {"type": "date", "from": "path"},
    },
}  # fmt: skip


def test_a_contract_is_its_literal() -> None:
    made = read(SALES)
    assert read(literal(made)) == made
    assert literal(read(literal(made))) == literal(made)
    assert [each.name for each in made.columns] == list(SALES["columns"])
    amount, due, day = (made.column(name) for name in ("net amount", "due", "day"))
    assert amount and due and day
    assert (amount.type, amount.minimum, amount.maximum) == ("decimal(18,2)", "-0.5", "1000000000")
    assert due.minimum == "2025-12-31 22:00:00+00:00"
    assert day.format == "%Y-%m-%d", "the path's"


def test_a_double_may_be_as_large_as_doubles_are() -> None:
    for bound in ("1e300", 1e300, 10**300, -1.7e308, "5e-324"):
        made = read(with_column(type="double", minimum=bound, enum=[bound]))
        assert made.columns[0].minimum == float(bound)
        assert read(literal(made)) == made
        assert from_toml(to_toml(made)) == made


def test_two_columns_of_one_control_group_do_no_harm_if_it_is_not_used() -> None:
    columns = {"a b": "integer", "a_b": "integer", "c": "integer"}
    assert read(with_(columns=columns, dialect={"control": "^(?P<rows>.*);(?P<sum_c>.*)"}))


def with_column(**words: Any) -> dict[str, Any]:
    return {"table": "t", "files": ["*.csv"], "columns": {"amount": words}}


def with_(**words: Any) -> dict[str, Any]:
    return with_column(type="integer") | words


BAD: dict[str, tuple[object, list[str]]] = {
    "not a mapping": ([], ["mapping"]),
    "unknown key": (with_(colums={}), ["table t", "'colums'", "columns"]),
    "key of another kind": ({1: 2}, ["1", "table"]),
    "a key nearly right": (
        with_column(type="integer", minimun=1),
        ["table t, column amount", "'minimun'", "did you mean minimum"],
    ),
    "a key of another type": (
        with_column(type="integer", pattern="x"), ["column amount", "pattern", "minimum"],
    ),
    "no such type": (with_column(type="string"), ["'string'", "did you mean text", "decimal(p,s)"]),
    "a type that is a number": (with_column(type=10**5000), ["column amount", "integer"]),
    "no type": (with_column(required=True), ["type is missing", "timestamp[tz]"]),
    "precision": (with_column(type="decimal(39,2)"), ["decimal(39,2)", "38"]),
    "scale": (with_column(type="decimal(2,3)"), ["decimal(2,3)"]),
    "a format without a year": (
        with_column(type="date", format="%d.%m."), ["'%d.%m.'", "year", "%d.%m.%Y"],
    ),
    "a word that no format has": (with_column(type="date", format="%d.%m.%q"), ["'%q'", "%Y"]),
    "12 hours without halves": (with_column(type="time", format="%I:%M"), ["%p"]),
    "a bound that is none": (with_column(type="date", minimum="2026-02-30"), ["2026-02-30"]),
    "a bound that is not exact": (with_column(type="decimal(5,2)", minimum=0.001), ["0.001"]),
    "a decimal of a great many digits": (
        with_column(type="decimal(18,2)", minimum="1e999999999999999999"), ["1e9999", "decimal"],
    ),
    "a decimal of a great many zeros": (
        with_column(type="decimal(18,2)", minimum="1e-999999999999999999"), ["1e-9999", "decimal"],
    ),
    "an integer of a great many digits": (
        with_column(type="integer", minimum="1e999999999999999999"), ["1e9999", "integer"],
    ),
    "a double without an end": (with_column(type="double", minimum="1e400"), ["1e400", "double"]),
    "an integer that is no double": (with_column(type="double", minimum=10**400), ["double"]),
    "a double that is none": (with_column(type="double", maximum="sNaN"), ["sNaN", "double"]),
    "an instant after the last year": (
        with_column(type="timestamp[tz]", maximum="9999-12-31T23:59:59-05:00"), ["9999-12-31"],
    ),
    "bounds the wrong way": (with_column(type="integer", minimum=2, maximum=1), ["above"]),
    "an enum of nothing": (with_column(type="integer", enum=[]), ["enum"]),
    "one sign for two things": (
        with_column(type="double", groupChar="."), ["decimalChar", "groupChar"],
    ),
    "a digit as a sign": (with_column(type="integer", groupChar="5"), ["groupChar", "'5'"]),
    "both true and false": (
        with_column(type="boolean", trueValues=["x"], falseValues=["x"]), ["'x'"],
    ),
    "required, and never missing": (
        with_column(type="text", required=True, missingValues=[]), ["missingValues"],
    ),
    "10,000 columns": (
        with_(columns={f"c{i}": "text" for i in range(10_000)}), ["10,000", "2,000"],
    ),
    "NUL in a name": (with_(columns={"a\0b": "text"}), [r"'a\\x00b'", "control"]),
    "a name of lineage": (with_(columns={"_cf_job": "text"}), ["'_cf_job'"]),
    "names that differ in case": (
        with_(columns={'say "x"': "text", 'SAY "x"': "text"}), ['say "x"', "case"],
    ),
    "a name twice": (
        with_(columns=[{"name": "a", "type": "text"}, {"name": "a", "type": "text"}]), ["twice"],
    ),
    "a name that is none": (with_(columns={1: "text"}), ["1"]),
    "a text for columns": (with_(columns="a,b"), ["'a,b'"]),
    "language of a later release": (with_(language=2), ["2", "1"]),
    "a table's name": (with_(table="../x"), ["'../x'"]),
    "a reserved table's name": (with_(table="x_rejects"), ["_rejects"]),
    "no files": (with_(files=[]), ["files"]),
    "files elsewhere": (with_(files=["../x.csv"]), ["'../x.csv'"]),
    "alternatives": (with_(files=["{a,b}.csv"]), ["{a,b}", "two patterns"]),
    "a placeholder without a column": (with_(files=["{region}.csv"]), ["region", "from"]),
    "a column without a placeholder": (
        {"table": "t", "files": ["*"],
         "columns": {"a": "text", "region": {"type": "text", "from": "path"}}},
        ["{region}"],
    ),
    "a key that is no column": (with_(key=["amuont"]), ["'amuont'", "'amount'"]),
    "too many percent": (with_(max_rejects="101%"), ["101%", "1%"]),
    "drift": (with_(drift="ignore"), ["'ignore'", "rescue"]),
    "a word of another dialect": (with_(dialect={"quoteChar": "'"}), ["quoteChar", "quote"]),
    "two headers": (with_(dialect={"header": "^a", "header_line": "3"}), ["header_line"]),
    "a control of nothing": (with_(dialect={"control": "^Total"}), ["rows", "sum_"]),
    "a sum of no column": (
        with_(dialect={"control": "^Total (?P<sum_amuont>.*)"}), ["sum_amuont", "sum_amount"],
    ),
    "a sum of two columns": (
        with_(
            columns={"a b": "integer", "a_b": "integer"},
            dialect={"control": "^Total (?P<sum_a_b>.*)"},
        ),
        ["sum_a_b", "'a b'", "'a_b'"],
    ),
    "a character class beside a placeholder": (
        with_(files=["{amount}/[[:digit:]]*.csv"]), ["'[[:digit:]'", "placeholder"],
    ),
    "an escaped bracket beside a placeholder": (
        with_(files=[r"{amount}/[\]]x.csv"]), ["placeholder", "[a-z0-9_]"],
    ),
    "two slashes beside a placeholder": (with_(files=["{amount}//x.csv"]), ["one slash"]),
    "a long regular expression": (with_column(type="text", pattern="a" * 5000), ["pattern"]),
    "a surrogate": (with_column(type="text", enum=["\ud800"]), ["enum"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str) -> None:
    given_, named = BAD[name]
    with pytest.raises(ContractError) as caught:
        contract.check(given_)
    message = str(caught.value)
    assert all(word in message for word in named), message
    assert message.isprintable()
    assert len(message) < 800


JUNK: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*SALES, "language", "drift", "reader"]), JUNK), st.data())
def test_any_literal_is_a_contract_or_an_error(words: dict[str, Any], data: Any) -> None:
    changed = {**SALES, **words}
    column = data.draw(st.sampled_from(list(SALES["columns"])))
    if isinstance(changed["columns"], dict):
        word = data.draw(st.sampled_from(["type", "format", "minimum", "enum", "true", "from"]))
        own = SALES["columns"][column]
        own = {"type": own} if isinstance(own, str) else own
        changed["columns"] = changed["columns"] | {column: own | {word: data.draw(JUNK)}}
    try:
        made = read(changed)
    except ContractError as error:
        assert str(error).isprintable()
    else:
        assert read(literal(made)) == made
        assert from_toml(to_toml(made)) == made


def test_a_survey_is_no_table() -> None:
    contract.check({"survey": {"dialect": {}}})
    assert contract.is_survey({"survey": {}})
    assert not contract.is_survey(SALES)
    with pytest.raises(ContractError):
        contract.check({"survey": {}, "table": "t"})


def test_toml_gives_the_contract_back() -> None:
    made = read(SALES)
    text = to_toml(made)
    assert from_toml(text) == made
    assert 'zip = "text"' in text
    assert to_toml(from_toml(text)) == text
    dated = 'table = "t"\nfiles = ["*"]\n[columns]\nd = {type = "date", minimum = 2026-01-31}\n'
    assert from_toml(dated).columns[0].minimum == "2026-01-31"


@pytest.mark.parametrize("text", ["table = ", "table = 'a'\ntable = 'b'", "[" * 5000, "a" * 2**21])
def test_what_is_no_toml_is_an_error(text: str) -> None:
    with pytest.raises(ContractError):
        from_toml(text)


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9
)


@given(st.lists(words.filter(lambda text: text == " ".join(text.split())), min_size=1, max_size=4),
       st.lists(words, max_size=3))  # fmt: skip
def test_toml_of_any_names_and_tokens(names: list[str], tokens: list[str]) -> None:
    columns = [{"name": name, "type": "integer", "missingValues": tokens} for name in names]
    try:
        made = read({"table": "t", "files": ["*"], "columns": columns})
    except ContractError:
        return
    assert from_toml(to_toml(made)) == made


def test_other_standards_have_what_ours_has() -> None:
    made = read(SALES)
    fields = {field["name"]: field for field in to_table_schema(made)["fields"]}
    assert to_table_schema(made)["primaryKey"] == ["order", "day"]
    assert fields["net amount"]["type"] == "number"
    assert (fields["net amount"]["decimalChar"], fields["net amount"]["groupChar"]) == (",", ".")
    assert fields["net amount"]["missingValues"] == ["", "k.A."]
    assert fields["paid"]["trueValues"] == ["ja"]
    assert fields["order"]["constraints"] == {"required": True, "unique": True}
    (schema,) = to_odcs(made, "1.2.0")["schema"]
    properties = {each["name"]: each for each in schema["properties"]}
    assert properties["net amount"]["physicalType"] == "decimal(18,2)"
    assert properties["day"]["primaryKeyPosition"] == 2
    assert properties["rate"]["quality"][0]["arguments"] == {"validValues": [0.5, 1.0]}
