"""`casparian query` reads the topics: it writes nothing, and sees no other file."""

from __future__ import annotations

import hashlib
import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.commands import COMMAND, Casparian, add_source, initialized
from tests.plugs import plugin

TWO_SINKS = plugin(
    'pattern="*.txt", sinks={"Lines": "parquet://output", "kept": "sqlite:///tables.sqlite3"}',
    """
        with open(file_path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        self.publish("Lines", pa.table({"line": lines}))
        self.publish("kept", pa.table({"n": list(range(len(lines)))}))
    """,
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """To be asked only."""
    casparian = initialized(tmp_path_factory.mktemp("asked") / "flow")
    source = add_source(casparian)
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b.txt").write_text("esc \x1b[31m bidi \u202e bell \x07\n")
    casparian.run("publish", casparian.plugin("rows", TWO_SINKS))
    casparian.run("scan", "--drain")
    return casparian


def files(folder: Path) -> dict[str, str]:
    """Every file under a folder, and the hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".sqlite3-shm", ".sqlite3-wal"))
    }


@pytest.fixture
def web() -> Iterator[list[str]]:
    """A server on this machine's loopback: what was asked of it; its address is the first."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        heard.append(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield heard
        server.shutdown()
        thread.join()


WRITES = [
    "EXPLAIN ANALYZE COPY (SELECT 42) TO '{out}'",
    "/* x */ explain\n analyze -- y\n copy (select 42) to '{out}'",
    "EXPLAIN (ANALYZE, FORMAT json) COPY (SELECT 42) TO '{out}'",
    "EXPLAIN COPY (SELECT 42) TO '{out}'",
    "EXPLAIN ANALYZE INSTALL httpfs FROM '{web}'",
    "EXPLAIN ANALYZE LOAD '{out}'",
    "EXPLAIN ANALYZE ATTACH '{out}'",
    "EXPLAIN ANALYZE EXPORT DATABASE '{out}'",
    "EXPLAIN ANALYZE SET threads = 1",
    "EXPLAIN ANALYZE PRAGMA enable_profiling='json'",
    "EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",
    "EXPLAIN ANALYZE DELETE FROM lines",
    "EXPLAIN ANALYZE WITH x AS (COPY (SELECT 42) TO '{out}') SELECT * FROM x",
    "WITH x AS (COPY (SELECT 42) TO '{out}') SELECT * FROM x",
    "WITH x AS (COPY (SELECT 42 AS line) TO '{published}' (FORMAT parquet)) FROM x",
    "WITH x AS (SELECT 1), y AS MATERIALIZED (COPY x TO '{out}') SELECT * FROM x",
    "SELECT (WITH x AS (COPY (SELECT 42) TO '{out}') SELECT * FROM x)",
    "FROM (WITH x AS (COPY (SELECT 42) TO '{out}') FROM x)",
    "DESCRIBE WITH x AS (COPY (SELECT 42) TO '{out}') SELECT * FROM x",
    "SUMMARIZE WITH x AS (COPY (SELECT 42) TO '{out}') SELECT * FROM x",
    "WITH x AS (INSERT INTO lines VALUES ('x') RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM lines RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE lines SET line = 'x' RETURNING *) SELECT * FROM x",
    "FROM query('WITH x AS (COPY (SELECT 42) TO ''{out}'') FROM x')",
    "FROM query('SELECT 1')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "FROM enable_logging('QueryLog', storage = 'file', storage_path = '{out}')",
    "FROM enable_profiling()",
    "FROM arrow_scan(1, 2, 3)",
    "FROM checkpoint()",
    "CALL enable_logging()",
    "COPY lines TO '{out}'",
    "COPY (SELECT 42) TO '{published}'",
    "EXPORT DATABASE '{out}'",
    "ATTACH '{out}' AS other",
    "ATTACH '{ledger}' AS other (TYPE sqlite)",
    "INSTALL httpfs FROM '{web}'",
    "LOAD '{out}'",
    "CREATE TABLE t AS SELECT 1",
    "SET threads = 1",
    "PRAGMA enable_profiling",
    "PREPARE p AS COPY (SELECT 42) TO '{out}'",
    "SELECT 1; COPY (SELECT 42) TO '{out}'",
    "",
    "/* nothing */",
]


def test_what_does_more_than_read_is_refused(asked: Casparian, web: list[str]) -> None:
    published = next((asked.folder / "output" / "Lines").glob("*.parquet"))
    out = asked.folder / "written"
    ledger = asked.folder / "casparian_flow.sqlite3"
    before = files(asked.folder)
    for sql in WRITES:
        question = sql.format(out=out, published=published, web=web[0], ledger=ledger)
        assert "error:" in asked.err("query", question, code=1), sql
        assert not out.exists(), sql
        assert files(asked.folder) == before, sql
        assert web[1:] == [], sql


@pytest.mark.parametrize("topic", ["Lines", "kept"])
def test_the_file_of_each_row_is_told_to_who_asks(asked: Casparian, topic: str) -> None:
    question = f"SELECT _cf_path, count(*) AS n FROM {topic} GROUP BY ALL ORDER BY ALL"
    assert asked.json("query", question) == [
        {"_cf_path": "in/a.txt", "n": 2}, {"_cf_path": "in/b.txt", "n": 1},
    ]  # fmt: skip
    assert "_cf_path" not in asked.json("query", f"SELECT * FROM {topic}")[0]


READS_ELSEWHERE = [
    "FROM read_text('/etc/passwd')",
    "FROM read_blob('{ledger}')",
    "FROM '{config}'",
    "FROM read_csv('{config}')",
    "FROM glob('/etc/*')",
    "FROM sniff_csv('/etc/passwd')",
    "FROM read_text('{folder}/output/Lines/../../global_config.toml')",
    "FROM read_parquet('{folder}/output/other/*.parquet')",
    "SELECT * FROM lines UNION ALL SELECT content, 1, 1, '', '' FROM read_text('/etc/passwd')",
    "FROM read_text('{web}/x')",
    "FROM '{web}/x.parquet'",
    "FROM read_csv('{web}/x.csv')",
    "FROM parquet_metadata('{web}/x.parquet')",
    "FROM parquet_schema('{folder}/x.parquet')",
    "FROM parquet_file_metadata('{config}')",
    "FROM parquet_bloom_probe('{config}', 'n', 1)",
    "FROM read_text('file://{config}')",
    "FROM read_text('file:{config}')",
    "FROM read_text('global_config.toml')",
    "FROM query_table('{config}')",
    "FROM query_table(['lines', '{config}'])",
    "FROM read_blob('/proc/self/environ')",
    "FROM read_csv('/dev/stdin')",
    "FROM duckdb_secrets()",
    "SELECT 1 WHERE 1 = (SELECT count(*) FROM read_text('{config}'))",
    "FROM outputs",
    "FROM question",
    "SELECT getenv('HOME')",
]
UNKNOWN = {
    "FROM '{config}'", "FROM query_table('{config}')", "FROM query_table(['lines', '{config}'])",
    "FROM outputs", "FROM question", "SELECT getenv('HOME')",
}  # fmt: skip
"""To DuckDB these are names, and there is nothing of that name."""


def test_no_other_file_and_no_host_is_read(asked: Casparian, web: list[str]) -> None:
    ledger = asked.folder / "casparian_flow.sqlite3"
    other = asked.folder / "output" / "other"
    other.mkdir()
    (other / "x.parquet").write_bytes(b"PAR1")
    config = asked.folder / "global_config.toml"
    for sql in READS_ELSEWHERE:
        question = sql.format(folder=asked.folder, ledger=ledger, config=config, web=web[0])
        done = asked.run("query", question, code=66 if sql in UNKNOWN else 1)
        assert done.stdout == "", sql
        assert web[1:] == [], sql


def test_the_topics_are_listed_and_described(asked: Casparian) -> None:
    topics = ["Lines", "Lines_history", "kept", "kept_history"]
    for question in ("show tables", "SHOW TABLES;", "/* all */ show tables -- of them", "SHOW"):
        assert sorted(row["name"] for row in asked.json("query", question)) == topics
    columns = {
        row["column_name"]: row["column_type"] for row in asked.json("query", "describe lines")
    }
    assert columns["line"] == "VARCHAR"
    assert "_cf_job_id" in columns
    described = asked.json("query", "DESCRIBE kept_history")
    assert described[0]["column_name"] == "n"
    (n, *_) = asked.json("query", "SUMMARIZE kept")
    assert (n["min"], n["max"], n["count"]) == ("0", "1", 3)
    everything = asked.json("query", "SHOW ALL TABLES")
    assert {"Lines", "kept_history"} <= {row["name"] for row in everything}
    assert "line" in next(row for row in everything if row["name"] == "Lines")["column_names"]
    asks = "SELECT table_name AS name FROM information_schema.columns WHERE column_name = 'n'"
    assert {"kept", "kept_history"} <= {row["name"] for row in asked.json("query", asks)}


READS = [
    "SELECT count(*) AS n FROM lines",
    "FROM lines SELECT count(*) AS n",
    "WITH x AS (SELECT * FROM lines) SELECT count(*) AS n FROM x",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 3) "
    "SELECT max(n) AS n FROM r",
    "SELECT 1 AS m, 3 AS n UNION SELECT 1, 3",
    "SELECT count(*) AS n FROM query_table('lines')",
    "SELECT count(*) AS n FROM range(3)",
    "SELECT count(*) AS n FROM kept_history",
    "(SELECT 3 AS n)",
    "SELECT (SELECT count(*) FROM lines) AS n; ",
    "VALUES (3)",
    "SELECT a::INT + 3 AS n FROM (PIVOT (SELECT 'a' AS k, 0 AS v) ON k IN ('a') USING sum(v))",
]
EXPLAINS = [
    "EXPLAIN SELECT * FROM lines",
    "EXPLAIN ANALYZE SELECT * FROM lines",
    "explain (format json) from lines",
    "EXPLAIN (ANALYZE, FORMAT json) SELECT line FROM lines",
    "/* how */ EXPLAIN -- it\n (SELECT * FROM lines)",
]


def test_a_pivot_that_would_look_for_its_columns_says_how_to_write_it(asked: Casparian) -> None:
    """DuckDB makes two statements of it, one of which creates a type."""
    error = asked.err("query", "PIVOT lines ON line USING count(*)", code=1)
    assert "IN ('a', 'b')" in error
    asked.run("query", "PIVOT lines ON line IN ('one', 'two') USING count(*)")


def test_every_form_of_reading_is_answered(asked: Casparian) -> None:
    for sql in READS:
        (row,) = asked.json("query", sql)
        assert list(row.values())[-1] == 3, sql
    for sql in EXPLAINS:
        (row,) = asked.json("query", sql)
        assert "PARQUET" in row["explain_value"].upper(), sql


def test_csv_is_raw_in_a_pipe_and_escaped_on_a_terminal(asked: Casparian) -> None:
    arguments = ["query", "--csv", "SELECT line FROM lines WHERE line LIKE 'esc%'"]
    raw = asked.out(*arguments)
    assert raw == "line\nesc \x1b[31m bidi \u202e bell \x07\n"
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [*COMMAND, *arguments], cwd=asked.folder, stdout=theirs, check=True, timeout=120
        )
        shown = os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown.split() == rb"line esc \x1b[31m bidi \u202e bell \x07".split()
