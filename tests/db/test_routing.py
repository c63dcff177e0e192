"""Which plugins want a file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import plugins, schema
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.models import PluginConfig, RoutingRule
from casparian_flow.db.routing import Routing, compile_pattern
from tests.factories import add_plugin


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.csv", "a.csv", True),
        ("*.csv", "deep/down/a.csv", True),
        ("*.csv", "a.csv/b", False),
        ("*.csv", ".hidden.csv", True),
        ("*.csv", "a.CSV", True),
        ("IN/*.CSV", "in/a.csv", True),
        ("é.csv", "É.csv", True),
        ("in/*.csv", "in/a.csv", True),
        ("in/*.csv", "x/in/a.csv", False),
        ("in/*.csv", "in/deep/a.csv", False),
        ("in/**/*.csv", "in/deep/er/a.csv", True),
        ("in/**/*.csv", "in/a.csv", True),
        ("/a.csv", "a.csv", True),
        ("/a.csv", "b/a.csv", False),
        ("*.{csv,tsv}", "b/a.tsv", True),
        ("[ab]?.txt", "b1.txt", True),
        ("*", "new\nline", True),
        ("caf*.csv", "caf\udce9.csv", True),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool) -> None:
    assert bool(compile_pattern(pattern).match(path)) is matches


@pytest.mark.parametrize(
    ("path", "matches"),
    [("in/a.csv", True), ("in/A.csv", True), ("in/a.CSV", False), ("IN/a.csv", False)],
)
def test_patterns_in_their_own_case(path: str, matches: bool) -> None:
    assert bool(compile_pattern("in/*.csv", any_case=False).match(path)) is matches


@pytest.mark.parametrize("pattern", ["", "/"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a pattern"):
        compile_pattern(pattern)


def test_a_pattern_that_stands_for_a_million_is_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        compile_pattern("{a,b}" * 20)


def test_rules_of_an_earlier_release_keep_their_case(tmp_path: Path) -> None:
    database = DatabaseSettings(db_location=str(tmp_path / "ledger.sqlite3"))
    scripts = [(name, sql) for name, sql in schema._scripts() if name < "0009"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "_scripts", lambda: scripts)
        schema.bring_up_to_date(database)
    with closing(schema.connect(database)) as old:
        old.begin_writing()
        old.execute("INSERT INTO cf_routing_rule (pattern, tag, priority) VALUES ('*.csv', 't', 0)")
        old.commit()
    with open_ledger(database) as ledger:
        ledger.write(lambda c: rule(c, "*.tsv", "t"))
        tags = ledger.read(Routing).tags
        found = {name: tags(name) for name in ("a.csv", "a.CSV", "a.tsv", "a.TSV")}
        assert found == {"a.csv": {"t"}, "a.CSV": set(), "a.tsv": {"t"}, "a.TSV": {"t"}}
        # A plugin's own rules match any case from its next publish on, and that is said.
        assert ledger.write(lambda c: plugins.replace_rules(c, "t", ["*.csv", "*.x"], 0)) == [
            "*.csv"
        ]
        assert ledger.read(Routing).tags("a.CSV") == {"t"}
        assert ledger.write(lambda c: plugins.replace_rules(c, "t", ["*.csv"], 0)) == []


def rule(connection: Connection, pattern: str, tag: str, priority: int = 0) -> None:
    connection.execute(insert(RoutingRule).values(pattern=pattern, tag=tag, priority=priority))


def test_tags_of_all_matching_rules_are_united(ledger: Ledger) -> None:
    def work(connection: Connection) -> Routing:
        rule(connection, "*.csv", "csv")
        rule(connection, "sales*", "sales")
        rule(connection, "*.txt", "text")
        return Routing(connection)

    assert ledger.write(work).tags("in/sales.csv") == {"csv", "sales"}


def test_every_subscriber_gets_one_job_at_the_highest_priority(ledger: Ledger) -> None:
    first = add_plugin(ledger, "first", subscriptions="csv,sales")
    second = add_plugin(ledger, "second", subscriptions=" csv ")
    add_plugin(ledger, "third", subscriptions="text")

    def work(connection: Connection) -> Routing:
        rule(connection, "*.csv", "csv", 5)
        rule(connection, "sales*", "sales", 50)
        return Routing(connection)

    wanted = {w.plugin_id: w.priority for w in ledger.write(work).job_requests("sales.csv", 1)}
    assert wanted == {first: 50, second: 5}


def test_only_the_active_version_of_a_plugin_takes_jobs(ledger: Ledger) -> None:
    add_plugin(ledger, "p", "1.0.0", subscriptions="csv")
    newer = add_plugin(ledger, "p", "1.1.0")
    ledger.write(lambda c: rule(c, "*", "csv"))
    ledger.write(lambda c: plugins.subscribe(c, "p", [], "1.1.0"))
    assert [w.plugin_id for w in ledger.read(Routing).job_requests("x", 1)] == [newer]


def test_the_fingerprint_follows_what_people_change(ledger: Ledger) -> None:
    seen = {ledger.read(Routing).fingerprint}
    add_plugin(ledger, "p", subscriptions="csv")
    seen.add(ledger.read(Routing).fingerprint)
    ledger.write(lambda c: rule(c, "*.csv", "csv"))
    seen.add(ledger.read(Routing).fingerprint)
    ledger.write(lambda c: c.execute(PluginConfig.__table__.update().values(subscription_tags="x")))  # type: ignore[attr-defined]
    seen.add(ledger.read(Routing).fingerprint)
    assert len(seen) == 4
