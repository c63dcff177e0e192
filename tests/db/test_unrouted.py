"""Files that no plugin wants: counted, and named with the rule that is nearest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from sqlalchemy import update

from casparian_flow.db import views
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileVersion, SourceRoot
from casparian_flow.db.views import CHOICES, Rules, literals
from casparian_flow.services import sources
from casparian_flow.services.scan import scan
from tests.db.test_adopt import output, rows, take
from tests.factories import add_plugin, add_root
from tests.services.test_scan import OLD, put


def names(ledger: Ledger) -> list[str]:
    rows = ledger.read(lambda c: views.unrouted_files(c, None))
    assert len(rows) == ledger.read(views.count_unrouted)
    return [row["rel_path"] for row in rows]


def test_what_nobody_wants_is_counted_and_listed(ledger: Ledger, source: Path) -> None:
    for name in ("a.csv", "b.tsv", "deep/c.txt"):
        put(source / name, name, OLD)
    root = add_root(ledger, source)
    add_plugin(ledger, "reader", subscriptions="csv")
    sources.add_rule(ledger, "*.csv", "csv")
    scan(ledger, root)
    assert names(ledger) == ["b.tsv", "deep/c.txt"]
    assert len(ledger.read(lambda c: views.unrouted_files(c, 1))) == 1
    assert ledger.read(lambda c: views.count_unrouted(c, "other")) == 0
    # A rule that comes later takes them; what it has queued stays wanted without it.
    rule_id, queued = sources.add_rule(ledger, "*.t?*", "csv")
    assert queued == 2
    assert names(ledger) == []
    assert sources.remove_rule(ledger, rule_id) == "*.t?* -> csv"
    assert names(ledger) == []
    # An edit is another version, which nobody wants now; a file that is gone counts no more.
    put(source / "b.tsv", "edited", OLD)
    scan(ledger, root)
    assert names(ledger) == ["b.tsv"]
    (source / "b.tsv").unlink()
    scan(ledger, root)
    assert names(ledger) == []


def test_a_removed_source_root_and_what_another_ledger_has_made_do_not_count(
    ledger: Ledger, source: Path
) -> None:
    file = put(source / "a.csv", "1", OLD)
    root = add_root(ledger, source)
    scan(ledger, root)
    assert names(ledger) == [file.name]
    ((number, ordinal, digest),) = rows(
        ledger, "SELECT id, ordinal, content_hash FROM cf_file_version"
    )
    made = output("", ordinal, path=b"a.csv", version_id=number)
    take(ledger, msgspec.structs.replace(made, content_hash=digest))
    assert names(ledger) == []
    ledger.write(lambda c: c.execute(update(SourceRoot).values(active=False)))
    assert names(ledger) == []
    assert ledger.read(lambda c: c.execute(FileVersion.__table__.select()).all())


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("orders.cvs", "delimited *.csv"),
        ("in/orders.csv.bak", "delimited *.csv"),
        ("orders.csv.2", "delimited *.csv"),
        ("orders.xls", "excel *.{xlsx,ods}"),
        ("lines.json", "json *.jsonl"),
        ("access_lg", "logs *access?([._])log"),
        ("letters.docx", ""),
        ("README", ""),
        ("other/feed.dat", "feed in/*.dat"),
        ("OLD.DBF", "dbase *.dbf (this rule matches only its exact case)"),
        ("x.xml", "markup *.xml (no plugin subscribes to tag markup)"),
    ],
)
def test_the_nearest_rule(ledger: Ledger, path: str, nearest: str) -> None:
    for name, pattern in (
        ("delimited", "*.csv"), ("excel", "*.{xlsx,ods}"), ("json", "*.jsonl"),
        ("logs", "*access?([._])log"), ("feed", "in/*.dat"), ("dbase", "*.dbf"),
        ("markup", "*.xml"),
    ):  # fmt: skip
        if name != "markup":
            add_plugin(ledger, name, subscriptions=name)
        any_case = name != "dbase"
        sources.add_rule(ledger, pattern, name, any_case=any_case)
    assert ledger.read(lambda c: Rules(c).nearest(path)) == nearest


def test_literals_of_a_pattern() -> None:
    assert literals("*.{csv,tsv}") == (".csv", ".tsv")
    assert literals("in/**/x_[0-9]?.@(txt|log)?(.gz)") == ("x_.txt",)
    assert literals("*") == ()
    assert len(literals("{a,b}" * 30)) == CHOICES
