"""What a guest says of itself, and the work that it causes, end nobody but itself."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import types
from pathlib import Path

import pyarrow as pa
import pytest

from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger
from casparian_flow.engine import bridge
from casparian_flow.engine.attempt import UNFOLDED_BYTES
from casparian_flow.engine.byte_code import real_modules
from casparian_flow.engine.guest_process import status_number
from casparian_flow.errors import GuestDied, JobError, OutputRefused, PluginTimeout
from casparian_flow.security.sandbox import THREADS
from casparian_flow.services.scan import scan
from tests.daemons import work_off
from tests.engine.guests import SECONDS, Start, file_info, loaded, plugin, run
from tests.engine.test_bridge import RAW_BATCH
from tests.engine.test_runner import Make, assignment, runner
from tests.engine.test_runner import run as attempt
from tests.factories import add_root
from tests.plugs import ROWS, publish

__all__ = ["runner"]

NAMES = [
    b"VmHWM:boom", b"VmHWM: 7 x", b"\xff\xfe", b"a\nVmHWM:\t 7 k", b"\nVmHWM: 7\n", b"\rVmHWM: 7",
    b"Threads: 9999", b"a\nThreads: 9999", b"\\nVmHWM: 7", b") R 1 (", b"", b"\x1b[2J\x07",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_but("VmHWM:boom")
def test_a_guest_may_call_itself_anything(start: Start, name: bytes) -> None:
    body = f"""
    import ctypes
    ctypes.CDLL(None).prctl(15, {name!r}, 0, 0, 0)
    self.publish("t", pa.table({{'n': [1]}}))
    """
    guest = loaded(start, body)
    assert run(guest)["t"].num_rows == 1
    assert 10 << 20 < guest.evidence.max_rss_bytes < 4 << 30
    assert 1 <= status_number(guest._process.pid, b"Threads") < 50


RECORDS = [
    "b'[' * 2_000_000", "b'{\"a\":' * 1_000_000", "b'[' * 9_000 + b']' * 9_000", "b'1' * 5_000_000",
    "b'1e999999'", "b'{\"kind\":\"exception\",\"message\":1e400,\"traceback\":\"\"}'",
    "b'[\"\\xff\\xfe\"]'", "b'\\0'", "b'null'", "b'[1]'", "b'[[]]'",
    "b'{\"topic\":\"t\",\"batches\":1' + b'0' * 5_000 + b',\"rows\":0,\"digest\":\"\"}'",
    "b'{\"kind\":\"exception\",\"message\":\"\\\\ud800\",\"traceback\":\"\"}'",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["FAILED", "DONE", "END"])
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.slow
def test_a_record_that_is_none_ends_the_job(start: Start, kind: str, record: str) -> None:
    guest = loaded(start, RAW_BATCH + f"wire.sendall(pack(FrameKind.{kind}, job, {record}))\n")
    with pytest.raises(GuestDied, match="invalid message"):
        run(guest)
    assert not guest.alive


def test_words_with_control_characters_are_kept_as_words(start: Start) -> None:
    words = "NUL \0, ESC \x1b[2J, bidi \u202e"
    said = json.dumps({"kind": "exception", "message": words, "traceback": words}).encode()
    guest = loaded(start, RAW_BATCH + f"wire.sendall(pack(FrameKind.FAILED, job, {said!r}))\n")
    with pytest.raises(JobError, match="bidi"):
        run(guest)


def test_a_flood_of_names_of_modules_costs_nothing(start: Start, tmp_path: Path) -> None:
    body = RAW_BATCH + (
        "name = pa.__file__.rpartition('/pyarrow/')[0] + '/' + 'a/' * 4_000_000\n"
        "wire.sendall(pack(FrameKind.DONE, job, json.dumps([name]).encode()))\n"
    )
    guest = loaded(start, body)
    run(guest)
    assert [len(name) > 8_000_000 for name in guest.compiled_anew] == [True]
    assert list(real_modules(tmp_path, guest.compiled_anew)) == []


FLOOD = """
import threading
threading.stack_size(32768)
wait = threading.Event()
for _ in range(20_000): threading.Thread(target=wait.wait, daemon=True).start()
"""


@pytest.mark.parametrize("loading", [False, True])
def test_a_flood_of_small_threads_is_ended(start: Start, loading: bool) -> None:
    guest = start(FLOOD.encode() if loading else plugin(FLOOD))
    with pytest.raises(JobError, match=f"more than {THREADS} threads|can't start new thread"):
        guest.load()
        run(guest)
    assert not guest.alive or os.getuid() != 0


def test_a_flood_of_threads_is_ended_while_the_host_is_at_work(start: Start) -> None:
    """It sends one batch, and the host does not come back for more until the guest has ended."""
    guest = loaded(start, f"self.publish('t', pa.table({{'n': [1]}}))\n{FLOOD}")
    batches = guest.run(file_info(), SECONDS)
    next(batches)
    if os.getuid() == 0:
        os.waitid(os.P_PID, guest._process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(JobError, match=f"more than {THREADS} threads|can't start new thread"):
        next(batches)


LAYOUTS = {
    "lists of nulls of a fixed size": (
        "pa.FixedSizeListArray.from_arrays(pa.nulls(65536 * 8000), 8000)", "of 2097414144 bytes"
    ),
    "such lists in lists": (
        "pa.FixedSizeListArray.from_arrays("
        "pa.FixedSizeListArray.from_arrays(pa.nulls(1000 ** 3), 1000), 1000)", "when unpacked"
    ),
    "lists of nulls by offsets": (
        "pa.LargeListArray.from_arrays("
        "pa.array(range(0, (1 << 29) + 1, 1 << 19), pa.int64()), pa.nulls(1 << 29))", "unpacked"
    ),
    "values of no width": (
        "pa.FixedSizeListArray.from_arrays(pa.Array.from_buffers("
        "pa.binary(0), 1 << 28, [None, pa.py_buffer(b'')]), 1 << 20)", "of 1073"
    ),
    "structs of nulls": (
        "pa.StructArray.from_arrays([pa.nulls(65536)] * 2000, [str(n) for n in range(2000)])",
        "when unpacked"
    ),
    "a dictionary": ("pa.array(['x' * 48000]).dictionary_encode()", "a dictionary column"),
    "a dictionary in a list": (
        "pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), "
        "pa.array(['x']).dictionary_encode())", "a dictionary column"
    ),
    "string views": ("pa.array(['x'], pa.string_view())", "a view column"),
    "binary views": ("pa.array([b'x'], pa.binary_view())", "a view column"),
    "list views": ("pa.array([[1]], pa.list_view(pa.int8()))", "a view column"),
    "large list views": ("pa.array([[1]], pa.large_list_view(pa.int8()))", "a view column"),
    "runs": ("pa.RunEndEncodedArray.from_arrays([65536], [1])", "a run-end-encoded column"),
    "runs in a struct": (
        "pa.StructArray.from_arrays([pa.RunEndEncodedArray.from_arrays([9], [1])], ['r'])",
        "a run-end-encoded column"
    ),
    "a union": (
        "pa.UnionArray.from_dense(pa.array([0] * 9, pa.int8()), pa.array([0] * 9, pa.int32()), "
        "[pa.array(['x'])])", "a union column"
    ),
    "many levels": (
        "__import__('functools').reduce(lambda a, _: pa.StructArray.from_arrays([a], ['x']), "
        "range(60), pa.array([1]))", "nested 61 levels deep"
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_unfolds_to_much_is_refused_before_it_is_read(
    start: Start, layout: str
) -> None:
    array, words = LAYOUTS[layout]
    guest = loaded(start, f"{RAW_BATCH}\nsend(stream(pa.record_batch({{'x': {array}}})))\n")
    with pytest.raises(GuestDied, match=words):
        run(guest)
    assert not guest.alive


SCHEMAS = {
    "many columns": "pa.RecordBatch.from_arrays([pa.nulls(1)] * 33_000, list(map(str, range(33_000))))",  # noqa: E501
    "very many": "pa.RecordBatch.from_arrays([pa.nulls(1)] * 100_000, ['a'] * 100_000)",
    "a long name": "pa.RecordBatch.from_arrays([pa.nulls(1)], ['n' * (50 << 20)])",
    "metadata": "pa.record_batch({'x': [1]}).replace_schema_metadata({'k': 'v' * (50 << 20)})",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_that_costs_much_is_refused_before_it_is_read(start: Start, schema: str) -> None:
    guest = loaded(start, f"{RAW_BATCH}\nsend(stream({SCHEMAS[schema]}))\n")
    with pytest.raises(GuestDied, match=r"columns and fields|metadata of"):
        run(guest)


def test_values_count_for_the_output_though_they_have_no_bytes(start: Start) -> None:
    body = """
    def flood():
        while True: yield pa.table({'z': pa.nulls(65536)})
    self.publish("t", flood())
    """
    guest = loaded(start, body, output_limit_bytes=8 << 20)
    with pytest.raises(OutputRefused, match="more than 8388608 bytes"):
        run(guest)


def test_the_sdk_sends_much_that_is_little_in_pieces(start: Start) -> None:
    body = """
    lists = pa.FixedSizeListArray.from_arrays(pa.nulls(4096 * 3000), 3000)
    self.publish("t", pa.table({'x': lists}))
    """
    guest = loaded(start, body)
    sizes = [batch.num_rows for _, batch in guest.run(file_info(), SECONDS)]
    assert sum(sizes) == 4096
    assert max(sizes) * 3000 * 4 <= UNFOLDED_BYTES


def test_one_row_that_unfolds_to_more_than_a_batch_may_is_refused_in_words(start: Start) -> None:
    body = "self.publish('t', pa.table({'x': pa.array([[None] * 1_000_000])}))"
    with pytest.raises(OutputRefused, match="one row has 4000"):
        run(loaded(start, body, limit=2 << 20))


@pytest.mark.parametrize(("rows", "ends"), [(1, True), (131_072, False)])
def test_what_the_host_computes_is_the_guests_time_unless_its_bytes_pay_for_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, rows: int, ends: bool
) -> None:
    """Four tenths of a second for each batch, of a few bytes or of half a mebibyte; the guest has
    twenty seconds."""
    spent = 0.0
    clock = types.SimpleNamespace(
        monotonic=lambda: time.monotonic() + spent, thread_time=lambda: time.thread_time() + spent
    )
    monkeypatch.setattr(bridge, "time", clock)
    body = f"""
    table = pa.table({{'n': pa.array(range({rows}))}})
    for _ in range(100): self.publish('t', table)
    """
    guest = loaded(start, body)
    batches = guest.run(file_info(), 20.0)
    seen = 0
    try:
        for _ in batches:
            seen += 1
            spent += 0.4
    except PluginTimeout:
        assert ends
        assert 10 < seen < 60
    else:
        assert not ends
        assert seen >= 100


LOCKS = """
import fcntl, struct
fd = os.open(pa.__file__, os.O_RDONLY)
for n in range(100_000):
    fcntl.fcntl(fd, fcntl.F_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 2 * n, 1, 0))
fcntl.lockf(fd, fcntl.LOCK_SH)
self.publish("t", pa.table({'n': [1]}))
"""


def test_locks_of_a_guest_take_no_memory_of_the_kernel(start: Start) -> None:
    guest = loaded(start, LOCKS)
    batches = guest.run(file_info(), SECONDS)
    next(batches)
    held = [line.split()[4] for line in Path("/proc/locks").read_text().splitlines()]
    assert str(guest._process.pid) not in held
    batches.close()


def test_a_database_is_read_without_scratch_space(start: Start, tmp_path: Path) -> None:
    """SQLite locks what it reads."""
    file = tmp_path / "guest" / "in" / "a.db"
    body = """
    import sqlite3
    rows = sqlite3.connect(f"file:{file_path}?mode=ro", uri=True).execute("select * from t")
    self.publish("t", pa.table({'n': [row[0] for row in rows]}))
    """
    guest = loaded(start, body)
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("create table t (n)")
        database.execute("insert into t values (42)")
        database.commit()
    assert run(guest, path=str(file))["t"].to_pylist() == [{"n": 42}]


DEEP = """
os.chdir(os.environ["TMPDIR"])
for _ in range(3000):
    os.mkdir("d"); os.chdir("d")
import __main__
__main__.WIRE.sendall(b"broken" * 9)
"""


def test_a_deep_folder_that_a_guest_leaves_goes_with_it(
    runner: Make, tmp_path: Path, default_lock: str
) -> None:
    (tmp_path / "a.txt").write_bytes(b"x")
    ours = runner(sandbox="off")
    receipt = attempt(ours, assignment(tmp_path / "a.txt", b"x"), plugin(DEEP), default_lock)
    assert "invalid message" in receipt.error
    ours.close()
    assert list((tmp_path / "guests").iterdir()) == []


@pytest.mark.slow
def test_a_deep_folder_does_not_end_the_next_start(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    from tests.test_trees import fill

    left = settings.database.guests_folder / "left"
    left.mkdir(parents=True)
    fill(left)
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("x")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}
    assert not left.exists()


CATEGORIES = """
import pandas as pd
words = ["a", None, "a word of more than twelve bytes"] * 400
columns = {
    "plain": pa.array(words),
    "category": pa.array(words).dictionary_encode(),
    "pandas": pa.Array.from_pandas(pd.Categorical(words)),
    "view": pa.array(words, pa.string_view()),
    "runs": pa.RunEndEncodedArray.from_arrays([400, 1200], ["x", None]),
    "lists": pa.array([[1, None], None, []] * 400, pa.list_view(pa.int32())),
    "inside": pa.StructArray.from_arrays([pa.array(words).dictionary_encode()], ["c"]),
}
self.publish("t", pa.table(columns))
"""


def test_layouts_that_the_wire_does_not_take_are_written_out(start: Start) -> None:
    words = ["a", None, "a word of more than twelve bytes"] * 400
    table = run(loaded(start, CATEGORIES))["t"]
    for name in ("plain", "category", "pandas", "view"):
        assert table[name].to_pylist() == words, name
    assert table["runs"].to_pylist() == ["x"] * 400 + [None] * 800
    assert table["lists"].to_pylist() == [[1, None], None, []] * 400
    assert table["inside"].to_pylist() == [{"c": word} for word in words]
    assert table.schema.field("view").type == pa.string()
