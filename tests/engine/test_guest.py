"""A guest does what its plugin says and tells what went wrong. Real processes only."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from casparian_flow.engine.bridge import HEAD, TAIL
from casparian_flow.errors import (
    GuestDied,
    OutputRefused,
    PluginFailed,
)
from tests.engine.guests import SECONDS, Start, file_info, loaded, plugin, run

FORMS = [
    "pd.DataFrame({'n': [1, 2, 3]})",
    "pd.DataFrame({'x': [9, 9, 9], 'n': [1, 2, 3]}).set_index('x').reset_index()[['n']]",
    "pa.table({'n': [1, 2, 3]})",
    "pa.table({'n': pa.chunked_array([[1], [2, 3]])})",
    "pa.record_batch({'n': [1, 2, 3]})",
    "pa.table({'n': [1, 2, 3]}).to_reader()",
    "Streamed()",
    "(pd.DataFrame({'n': [i]}) for i in (1, 2, 3))",
    "iter([pa.table({'n': [1]}), pa.record_batch({'n': [2, 3]})])",
    "pd.read_csv(io.StringIO('n\\n1\\n2\\n3\\n'), chunksize=2)",
]
"""Each is three rows of `n`."""


def test_every_form_of_publish(start: Start) -> None:
    """One guest for all of them: it is started once, and imports pandas once."""
    body = f"""
    import io, pandas as pd
    class Streamed:
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.table({{'n': [1, 2, 3]}}).__arrow_c_stream__(requested_schema)
    forms = [{", ".join(f"lambda: {form}" for form in FORMS)}]
    self.publish("t", forms[int(self.file.rel_path)]())
    """
    guest = loaded(start, body)
    for number, form in enumerate(FORMS):
        assert run(guest, rel_path=str(number))["t"].to_pydict() == {"n": [1, 2, 3]}, form
        assert guest.ends["t"].rows == 3, form


def test_an_index_with_names_is_kept_as_a_column(start: Start) -> None:
    body = """
    import pandas as pd
    self.publish("t", pd.DataFrame({'n': [1]}, index=pd.Index(['a'], name='key')))
    """
    assert run(loaded(start, body))["t"].to_pydict() == {"n": [1], "key": ["a"]}


def test_categories_of_different_chunks_agree(start: Start) -> None:
    body = """
    import pandas as pd
    self.publish("t", pd.DataFrame({'c': pd.Categorical(['x'])}))
    self.publish("t", pd.DataFrame({'c': pd.Categorical([str(i) for i in range(300)])}))
    """
    assert run(loaded(start, body))["t"].num_rows == 301


def test_large_tables_leave_in_batches_of_about_a_mebibyte(start: Start) -> None:
    body = "self.publish('t', pa.table({'n': pa.array(range(500_000)), 'z': pa.nulls(500_000)}))"
    guest = loaded(start, body)
    sizes = [(b.num_rows, b.nbytes) for _, b in guest.run(file_info(), SECONDS)]
    assert sum(rows for rows, _ in sizes) == 500_000
    assert max(rows for rows, _ in sizes) <= 65536
    assert max(size for _, size in sizes) <= 1.1 * (1 << 20)
    assert guest.ends["t"].batches == len(sizes)


def test_a_table_without_rows_still_says_its_columns(start: Start) -> None:
    body = """
    self.publish("t", pa.table({'n': pa.array([], pa.int64())}))
    self.publish("u", pa.table({}))
    """
    tables = run(loaded(start, body, ("t", "u")))
    assert tables["t"].schema == pa.schema([("n", pa.int64())])
    assert "u" not in tables


def test_a_slice_above_the_limit_is_halved_and_a_row_above_it_refused(start: Start) -> None:
    body = """
    rows = 8 if self.file.job_id == 1 else 1
    size = (1 << 19) // rows
    self.publish("t", pa.table({'b': [b'x' * size] * rows + [b''] * 100_000}))
    """
    guest = loaded(start, body, ("t",), 1 << 18)
    assert run(guest, job_id=1)["t"].num_rows == 100_008
    with pytest.raises(OutputRefused, match="batch_limit_bytes"):
        run(guest, job_id=2)


def test_the_plugin_sees_its_file_whatever_its_name(start: Start, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/guest/in/na\xffme\n.csv"
    Path(os.fsdecode(path)).parent.mkdir(parents=True)
    Path(os.fsdecode(path)).write_bytes(b"1234")
    body = """
    print(file_path)
    self.publish("t", pa.table({
        'n': [os.path.getsize(file_path)], 'rel': [ascii(self.file.rel_path)]}))
    """
    guest = loaded(start, body)
    tables = run(guest, path=os.fsdecode(path), rel_path=os.fsdecode(b"na\xffme\n.csv"))
    assert tables["t"].to_pydict() == {"n": [4], "rel": ["'na\\udcffme\\n.csv'"]}
    assert "na\\udcffme" in guest.take_log()


def test_what_a_plugin_prints_and_logs_is_its_log_and_not_the_wire(start: Start) -> None:
    body = """
    import logging
    print("out \\x1b[2J", b"\\x11\\x00")
    print("error", file=sys.stderr)
    logging.getLogger("plugin").info("logged")
    os.write(1, b'from below\\n')
    self.publish("t", pa.table({'n': [1]}))
    """
    guest = loaded(start, body)
    run(guest)
    log = guest.take_log()
    for words in ("out \\x1b[2J", "error\n", "INFO:plugin:logged", "from below"):
        assert words in log
    assert guest.take_log() == ""


@pytest.mark.parametrize("stream", ["sys.stdout", "sys.stderr"])
def test_a_flood_of_prints_neither_blocks_nor_grows(start: Start, stream: str) -> None:
    body = f"""
    print("first", file={stream})
    for _ in range(50): {stream}.write("x" * (1 << 20))
    print("last", file={stream})
    self.publish("t", pa.table({{'n': [1]}}))
    """
    guest = loaded(start, body)
    run(guest)
    log = guest.take_log()
    assert log.startswith("first")
    assert log.endswith("last\n")
    assert "bytes left out" in log
    assert len(log) < HEAD + TAIL + 100


def test_an_exception_fails_the_job_and_the_guest_serves_on(start: Start) -> None:
    body = """
    if self.file.job_id == 1:
        self.publish("t", pa.table({'n': [1]}))
        raise RuntimeError("broken line 7")
    self.publish("t", pa.table({'pid': [os.getpid()]}))
    """
    guest = loaded(start, body)
    before = run(guest, job_id=2)
    with pytest.raises(PluginFailed, match=r"demo 1\.0\.0: RuntimeError: broken line 7"):
        run(guest, job_id=1)
    assert guest.ends == {}
    log = guest.take_log()
    assert 'raise RuntimeError("broken line 7")' in log  # the source line, from memory
    assert 'File "demo.py"' in log.splitlines()[1]
    assert guest.alive
    assert run(guest, job_id=3) == before
    assert guest.jobs_served == 3


@pytest.mark.parametrize("how", ["sys.exit(3)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_no_exception_ends_the_guest(start: Start, how: str) -> None:
    guest = loaded(start, how)
    with pytest.raises(PluginFailed):
        run(guest)
    assert guest.alive


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("self.publish('other', pa.table({'n': [1]}))", r"'other' is not declared; declared: t"),
        ("self.publish('t', {'n': [1]})", r"was given a dict"),
        ("self.publish('t', [{'n': 1}])", "was given a list"),
        ("self.publish('t', iter([{'n': 1}]))", "was given a dict"),
        ("self.publish('t', 'text')", "was given a str"),
        ("self.publish('t', None)", "was given a NoneType"),
        ("self.publish('t', pa.chunked_array([[1]]))", "ChunkedArray is not a table"),
        (
            "import pandas as pd; self.publish('t', pd.DataFrame({'a': [1, 'x']}))",
            "column a with type object",
        ),
        (
            "for v in (1, 1.5): self.publish('t', pa.table({'k': [0], 'n': [v]}))",
            "first `n: int64`, now `n: double`; give explicit dtypes",
        ),
        (
            "for d in ({'n': [1]}, {'n': [1], 'm': [2]}): self.publish('t', pa.table(d))",
            "first `absent`, now `m: int64`",
        ),
        (
            "try: self.publish('t', None)\nexcept TypeError: pass",  # rows would be missing
            "was given a NoneType",
        ),
    ],
)
def test_refusals_are_permanent_and_say_why(start: Start, body: str, words: str) -> None:
    guest = loaded(start, body)
    with pytest.raises(OutputRefused, match=words):
        run(guest)
    assert "in execute" in guest.take_log()
    assert guest.alive


def test_an_error_in_the_plugins_own_generator_is_no_refusal(start: Start) -> None:
    body = """
    def rows():
        yield pa.table({'n': [1]})
        raise ValueError("bad line")
    self.publish("t", rows())
    """
    with pytest.raises(PluginFailed, match="bad line"):
        run(loaded(start, body))


@pytest.mark.parametrize(
    ("source", "error", "words", "logged"),
    [
        (b"import nothing_of_the_kind\n", PluginFailed, "nothing_of_the_kind", "demo.py"),
        (b"def broken(:\n", PluginFailed, "SyntaxError", "def broken(:"),
        (b"x = 1\n", OutputRefused, r"plugin demo has no class Handler\(BasePlugin\)", ""),
        (b"class Handler: pass\n", OutputRefused, "has no class Handler", ""),
        (b"import os; os._exit(4)\n", GuestDied, "ended with exit status 4", ""),
        (b"# coding: no-such\n", PluginFailed, "unknown encoding", ""),
    ],
)
def test_a_plugin_that_cannot_be_loaded(
    start: Start, source: bytes, error: type[Exception], words: str, logged: str
) -> None:
    guest = start(source)
    with pytest.raises(error, match=words):
        guest.load()
    log = guest.take_log()
    assert logged in log
    assert "guest.py" not in log
    assert not guest.alive


def test_a_coding_cookie_is_respected(start: Start) -> None:
    source = b"# coding: latin-1\n" + plugin(
        "self.publish('t', pa.table({'w': ['\xe9']}))"
    ).decode().encode("latin-1")
    guest = start(source)
    guest.load()
    assert run(guest)["t"].to_pydict() == {"w": ["é"]}


def test_the_guest_is_isolated_from_the_host(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("CASPARIAN_MSSQL", "Server=sql;UID=sa;PWD=s3cret")
    monkeypatch.setenv("CASPARIAN_MSSQL_PASSWORD", "s3cret")
    body = """
    import importlib.util, casparian_flow
    opened = []
    for number in range(256):
        try: os.fstat(number)
        except OSError: continue
        opened.append(number)
    self.publish("t", pa.table({
        'secret': [any(
            'SECRET' in name or 'CASPARIAN' in name or 's3cret' in value
            for name, value in os.environ.items()
        )],
        'stdin': [sys.stdin.read()],
        'sqlalchemy': [importlib.util.find_spec("sqlalchemy") is not None],
        'fds': [opened],
        'home': [os.getcwd() == os.environ["HOME"]],
    }))
    """
    row = run(loaded(start, body))["t"].to_pylist()[0]
    assert not row["secret"]
    assert row["stdin"] == ""
    assert not row["sqlalchemy"]
    assert row["home"]
    assert len(row["fds"]) == 4  # three streams and the wire
