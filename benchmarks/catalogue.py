"""The benchmarks. Each function creates its input and returns the comparison."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.inputs import SEED, TYPED, csv_files, random_files, tiny_files, typed_file
from benchmarks.measure import Benchmark, Command, Side, execute
from casparian_flow import bundled
from casparian_flow.config import FILE_NAME
from casparian_flow.security.choices import Choices, choose

HERE = Path(__file__).parent
CLI = (sys.executable, "-m", "casparian_flow.cli")
FIND_FORMAT = "%s %T@ %p\n"
HASH = 'find "$1" -type f -print0 | xargs -0 -P2 sha256sum'
FIND_THEN_IMPORT = 'find "$1" -type f -printf "$2" && "$3" -c "import sqlalchemy"'

PARQUET = ("write_table", "peers/parquet_write.py", "parquet://out")
SQLITE = ("executemany", "peers/sqlite_insert.py", "sqlite:///tables.sqlite3")
"""Name of the peer, script of the peer, and URI of our sink."""
LOAD = "`load` leaves out Python's start and imports."
BEFORE = "The whole process contains the version before. "


def small_files(inputs: Path, quick: bool) -> Benchmark:
    """Many small CSV files, one Parquet file each."""
    source = csv_files(inputs / "source", 100 if quick else 2_000)
    home = _home(inputs, source, plugin="tables.py")
    execute(_python("ours/scan.py"), home)
    text = (
        f"{len(list(source.iterdir())):,} CSV files of 8.1 KB, known and queued, to one Parquet "
        "file each: our daemon with two workers, against a pandas script on "
        "`multiprocessing.Pool(2)`. Both leave every file fsynced and renamed, and its folder "
        "fsynced; ours also commits each job to the ledger (SQLite, synchronous=FULL) and runs "
        "the plugin in a guest process. Imports count on both sides; `jobs` begins when our "
        "daemon is up, before the first claim, and contains the guests' start and imports."
    )
    return Benchmark(text, [
        Side("Pool(2)", _alone(_python("peers/pandas_pool.py", source))),
        Side("ours", _in_copy(home, _python("ours/drain.py")), peers=("Pool(2)",)),
    ])  # fmt: skip


def typed(inputs: Path, quick: bool) -> Benchmark:
    """A large CSV file with types, and what does not fit kept."""
    rows, faults = (20_000 if quick else 1_000_000), 37
    source = typed_file(inputs / "source", rows, faults)
    reader = bundled.path("delimited")
    contract = {"table": "typed", "files": ["*.csv"], "columns": TYPED}
    topics = ["typed", "typed_rejects"]
    choices = Choices("typed", ["*.csv"], topics, contract=contract)
    table = inputs / reader.name
    table.write_bytes(choose(reader.read_bytes(), reader.name, choices).source)
    homes = [_home(inputs, source, plugin) for plugin in (reader, table)]
    for home in homes:
        execute(_python("ours/scan.py"), home)
    text = (
        f"A CSV file of {rows:,} rows of 8 columns, a tenth of them with quotes, {faults} with "
        "a date that is none, to Parquet: the bundled reader without types (all text), and as a "
        "table, whose rejects have line, value and reason. DuckDB (one thread) and pandas give the "
        "same types, and what does not fit in a second file; DuckDB's grammars are wider than ours "
        "(`1.5` is a whole number there). All leave their files fsynced; ours runs in the sandbox, "
        "finds encoding and dialect, and commits the job. dlt is not a side: it keeps no rejects. "
        "`jobs` contains the guest's start and imports."
    )
    drain = _python("ours/drain.py")
    return Benchmark(text, [
        Side("DuckDB", _alone(_python("peers/duckdb_typed.py", source / "typed.csv"))),
        Side("pandas", _alone(_python("peers/pandas_typed.py", source / "typed.csv"))),
        Side("ours, untyped", _in_copy(homes[0], drain)),
        Side("ours, typed", _in_copy(homes[1], drain), peers=("DuckDB", "pandas")),
    ], rows)  # fmt: skip


def sandbox(inputs: Path, quick: bool) -> Benchmark:
    """The same small files, with the sandbox and without."""
    source = csv_files(inputs / "source", 100 if quick else 1_000)
    held = _home(inputs, source, plugin="tables.py")
    execute(_python("ours/scan.py"), held)
    free = inputs / "free"
    shutil.copytree(held, free)
    with (free / FILE_NAME).open("a") as file:
        file.write('\n[guest]\nsandbox = "off"\n')
    text = (
        f"{len(list(source.iterdir())):,} CSV files of 8.1 KB, known and queued, to one Parquet "
        "file each by our daemon with two workers: with the sandbox `required`, against the same "
        "with the sandbox `off`. `jobs` begins when the daemon is up and contains the guests' "
        "start and imports; the whole process contains the canary's guest."
    )
    drain = _python("ours/drain.py")
    return Benchmark(text, [
        Side("off", _in_copy(free, drain)),
        Side("required", _in_copy(held, drain), peers=("off",)),
    ])  # fmt: skip


def queue(inputs: Path, quick: bool) -> Benchmark:
    """Jobs that do nothing."""
    jobs = 300 if quick else 5_000
    home = _home(inputs, tiny_files(inputs / "source", jobs), plugin="nothing.py")
    text = (
        f"{jobs:,} jobs that do nothing, on two workers: ours are queued by the first scan of as "
        "many tiny files (found, hashed, recorded), huey's by as many calls. huey keeps its queue "
        "in SQLite with fsync=True (synchronous=FULL), runs worker processes with a short poll, "
        "forgets a task when a worker takes it, and a task marks its end with an 8 byte append. "
        "Ours commits queueing, claim, attempt and completion with synchronous=FULL, and each "
        "job is run by a guest process over its own copy of the file."
    )
    return Benchmark(text, [
        Side("huey", _alone(_python("peers/huey_queue.py", jobs))),
        Side("ours", _in_copy(home, _python("ours/drain.py", "--scan")), peers=("huey",)),
    ])  # fmt: skip


def scan_100k(inputs: Path, quick: bool) -> Benchmark:
    """First and unchanged scan of a large tree."""
    files = 2_000 if quick else 100_000
    source = tiny_files(inputs / "source", files)
    new = _home(inputs, source)
    _keep_nothing(new)
    known = _scanned(inputs, new)
    scan = _python("ours/scan.py")
    text = (
        f"{files:,} tiny files in folders of a hundred, page cache warm. The first scan hashes "
        "every file and records locations and versions (SQLite, synchronous=FULL, `[store] keep = "
        "false`); the rescan "
        "finds them unchanged. `find` prints each file's size, time and name and keeps nothing; "
        "`find + sha256sum` hashes on two processes (`xargs -0 -P2`) and keeps nothing. `scan` "
        "is the part of ours that a running daemon repeats: without Python's start and imports."
    )
    return Benchmark(text, [
        Side("find", _alone(["find", source, "-type", "f", "-printf", FIND_FORMAT])),
        Side("find + sha256sum", _alone(["sh", "-c", HASH, "sh", source])),
        Side("ours, first", _in_copy(new, scan), peers=("find", "find + sha256sum")),
        Side("ours, rescan", _in_copy(known, scan), peers=("find",)),
    ])  # fmt: skip


def store_500b(inputs: Path, quick: bool) -> Benchmark:
    """The cost of keeping the bytes of versions: files under 1 KB."""
    return _kept(
        inputs, count=500 if quick else 20_000, size=500, form="as rows of its SQLite file"
    )


def store_8k(inputs: Path, quick: bool) -> Benchmark:
    """The same, where a content fills a page."""
    return _kept(
        inputs, count=200 if quick else 10_000, size=8_000, form="as rows of its SQLite file"
    )


def store_20m(inputs: Path, quick: bool) -> Benchmark:
    """The same, where a content is a file of the store."""
    size = 1 << 20 if quick else 20 << 20
    return _kept(inputs, count=6, size=size, form="as files, copied, since ext4 shares no blocks")


def _kept(inputs: Path, count: int, size: int, form: str) -> Benchmark:
    source = random_files(inputs / "source", count, size)
    off = _home(inputs, source)
    on = inputs / "on"
    shutil.copytree(off, on)
    _keep_nothing(off)
    scan = _python("ours/scan.py")
    text = (
        f"The first scan of {count:,} files of {size:,} random bytes in folders of a hundred, page "
        f"cache warm, with their bytes kept ({form}) and durable before their versions are "
        "recorded, against `[store] keep = false`. `scan` leaves out Python's start and imports; "
        "`scan, CPU` is the processor time of that part, user and system, of all threads."
    )
    return Benchmark(text, [
        Side("not kept", _in_copy(off, scan)),
        Side("kept", _in_copy(on, scan), peers=("not kept",)),
    ])  # fmt: skip


def help(inputs: Path, quick: bool) -> Benchmark:
    """How fast the command line starts."""
    text = (
        "`casparian --help`, against a Python that imports typer and does nothing. Neither "
        "writes anything."
    )
    return Benchmark(text, [
        Side("import typer", _alone([sys.executable, "-c", "import typer"])),
        Side("casparian --help", _alone([*CLI, "--help"]), peers=("import typer",)),
    ])  # fmt: skip


def notice(inputs: Path, quick: bool) -> Benchmark:
    """From the close of a file in a watched folder to its queued job."""
    files, dropped = (1_000, 50) if quick else (100_000, 400)
    source = tiny_files(inputs / "source", files)
    known = _scanned(inputs, _home(inputs, source, plugin="nothing.py"))
    text = (
        f"{dropped} files dropped into a running daemon's source root of {files:,} files, ten a "
        "second on average, each into some folder of a hundred: seconds from the close of a file "
        "to its queued job (committed, synchronous=FULL), without the settle window of 0.5 s."
    )
    return Benchmark(text, [Side("ours", _in_copy(known, _python("ours/notice.py", dropped)))])


def oneshot(inputs: Path, quick: bool) -> Benchmark:
    """A scan without changes as a whole process, as cron may start it every minute."""
    files = 1_000 if quick else 10_000
    source = tiny_files(inputs / "source", files)
    known = _scanned(inputs, _home(inputs, source))
    peer = ["sh", "-c", FIND_THEN_IMPORT, "sh", str(source), FIND_FORMAT, sys.executable]
    text = (
        f"`casparian scan` of {files:,} unchanged files as a whole process, against `find` that "
        "prints their sizes, times and names and then a Python that imports sqlalchemy (both, "
        "one after the other). Ours commits the scan's end with synchronous=FULL; the peer "
        "writes nothing."
    )
    return Benchmark(text, [
        Side("find + import", _alone(peer)),
        Side("casparian scan", _in_copy(known, [*CLI, "scan"]), peers=("find + import",)),
    ])  # fmt: skip


def sink_parquet(inputs: Path, quick: bool) -> Benchmark:
    """Rows into the Parquet sink."""
    rows = _rows(inputs, quick)
    text = (
        f"{rows:,} rows of 10 columns from an Arrow file into a new Parquet file. Ours is staged, "
        "sealed and published, with four lineage columns more on every row; the peer is "
        "`pyarrow.parquet.write_table`. Both have row groups of 128k rows, zstd level 1, and leave "
        f"the file and its folder fsynced. {LOAD}"
    )
    return Benchmark(text, _sides(inputs, *PARQUET, "append", rounds=1), rows)


def sink_parquet_replace(inputs: Path, quick: bool) -> Benchmark:
    """Rows into the Parquet sink that replace as many."""
    rows = _rows(inputs, quick)
    text = (
        f"{rows:,} rows of 10 columns from an Arrow file, in the place of as many of the version "
        "before, which were published off the clock: one Parquet file put in the place of another. "
        "Ours looks, under a lock, whether the file there is its own and an older version's; the "
        "peer renames its file over whatever is there. Written and made durable as in "
        f"`sink_parquet`. {BEFORE}{LOAD}"
    )
    return Benchmark(text, _sides(inputs, *PARQUET, "replace", rounds=2), rows)


def sink_sqlite(inputs: Path, quick: bool) -> Benchmark:
    """Rows into the SQLite sink."""
    rows = _rows(inputs, quick)
    text = (
        f"{rows:,} rows of 10 columns from an Arrow file into a new SQLite table. Ours is "
        "staged, sealed and published, with four lineage columns more on every row and the "
        "output's entry in the sink's ledger; the peer is `executemany` of the same batches. "
        "Both commit once, in WAL mode with synchronous=FULL; ours fsyncs the staged file too. "
        f"{LOAD}"
    )
    return Benchmark(text, _sides(inputs, *SQLITE, "append", rounds=1), rows)


def sink_sqlite_replace(inputs: Path, quick: bool) -> Benchmark:
    """Rows into the SQLite sink that replace as many."""
    rows = _rows(inputs, quick)
    text = (
        f"{rows:,} rows of 10 columns from an Arrow file, in the place of as many of the version "
        "before, which were published off the clock. Ours deletes the rows of that version and "
        "inserts the new ones, the peer empties its table and does the same, each in one "
        f"transaction. Otherwise as `sink_sqlite`. {BEFORE}{LOAD}"
    )
    return Benchmark(text, _sides(inputs, *SQLITE, "replace", rounds=2), rows)


def _rows(inputs: Path, quick: bool) -> int:
    """Write the Arrow file that the sinks read; returns its number of rows."""
    rows = 50_000 if quick else 1_000_000
    execute(_python("ours/rows.py", inputs / "rows.arrow", rows, SEED), inputs)
    return rows


def stream(inputs: Path, quick: bool) -> Benchmark:
    """Arrow batches from a guest process to the host."""
    mib = 64 if quick else 1_024
    text = (
        f"{mib:,} MiB of Arrow batches of 1 MiB from a guest process to the host, against a "
        "script that writes and reads the same batches through a socketpair as one Arrow IPC "
        "stream. Ours bounds, validates and digests (SHA-256, on both ends) every batch; the "
        "peer does none of that. Nothing is written to disk. `streaming` leaves out the start "
        "of the processes and their imports."
    )
    return Benchmark(text, [
        Side("socketpair", _alone(_python("peers/socket_stream.py", mib))),
        Side("ours", _alone(_python("ours/stream.py", mib)), peers=("socketpair",)),
    ])  # fmt: skip


QUESTIONS = {
    "count": "SELECT count(*) FROM {0}",
    "filtered sum": "SELECT sum(amount) FROM {0} WHERE region = 'north'",
    "group": "SELECT region, count(*), sum(amount) FROM {0} GROUP BY region",
}


def query(inputs: Path, quick: bool) -> Benchmark:
    """Questions about a large topic in a SQLite sink."""
    rows, files = (50_000 if quick else 5_000_000), 10
    source = inputs / "source"
    source.mkdir()
    for file in range(files):
        part = f"{rows // files * file} {rows // files * (file + 1)}"
        (source / f"{file}.txt").write_text(part)
    home = _home(inputs, source, plugin="orders.py")
    execute(_python("ours/drain.py", "--scan"), home)
    text = (
        f"Three questions about a topic of {rows:,} rows in a SQLite sink, page cache warm: "
        "`casparian query`, against Python's sqlite3 on the sink's view of the topic. Whole "
        "processes; ours looks up in the ledger which outputs to show, and DuckDB answers."
    )
    sides = []
    for name, question in QUESTIONS.items():
        peer, asked = f"sqlite3, {name}", question.format("orders")
        ask = _python("peers/sqlite_ask.py", home / "tables.sqlite3", asked)
        sides.append(Side(peer, _alone(ask)))
        sides.append(Side(f"ours, {name}", _alone(_query(home, asked)), peers=(peer,)))
    return Benchmark(text, sides)


def query_small(inputs: Path, quick: bool) -> Benchmark:
    """Questions about many small outputs."""
    files = 300 if quick else 20_000
    home = _home(inputs, tiny_files(inputs / "source", files), plugin="small_outputs.py")
    execute(_python("ours/drain.py", "--scan"), home)
    text = (
        f"Questions about {files:,} outputs of 20 rows and three schemas, page cache warm: in a "
        "Parquet sink, against DuckDB alone on the same files (`union_by_name`), and in a SQLite "
        "sink, against Python's sqlite3 on the sink's view. Whole processes."
    )
    sides = []
    for name, question in QUESTIONS.items():
        for topic, script, place in (
            ("files", "peers/duckdb_files.py", home / "output" / "files"),
            ("rows", "peers/sqlite_ask.py", home / "tables.sqlite3"),
        ):
            peer, asked = f"{Path(script).stem}, {name}", question.format(topic)
            sides.append(Side(peer, _alone(_python(script, place, asked))))
            ours = _alone(_query(home, asked))
            sides.append(Side(f"ours, {topic}, {name}", ours, peers=(peer,)))
    return Benchmark(text, sides)


def _query(home: Path, question: str) -> Command:
    return [*CLI, "--config", str(home / FILE_NAME), "query", question]


def _sides(inputs: Path, peer: str, script: str, uri: str, mode: str, rounds: int) -> list[Side]:
    """The peer's script, and our sink with the same rows."""
    source = inputs / "rows.arrow"
    ours = _python("ours/sink.py", source, uri, mode, rounds)
    return [
        Side(peer, _alone(_python(script, source, rounds))),
        Side("ours", _alone(ours), peers=(peer,)),
    ]


def _python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / script), *map(str, arguments)]


def _alone(command: Command) -> Callable[[Path], Command]:
    """A command that starts in an empty folder."""
    return lambda folder: command


def _in_copy(home: Path, command: Command) -> Callable[[Path], Command]:
    """A command that starts in a copy of a configuration's folder, the same in each round."""

    def prepare(folder: Path) -> Command:
        shutil.copytree(home, folder, dirs_exist_ok=True)
        return command

    return prepare


def _home(inputs: Path, source: Path, plugin: str | Path = "") -> Path:
    """A configuration's folder with a ledger, one source root, and a published plugin.

    Args:
        plugin: a file of `plugins`, or a path.
    """
    home = inputs / f"home-{len(list(inputs.glob('home-*')))}"
    home.mkdir()
    plugins = [HERE / "plugins" / plugin] if plugin else []
    execute(_python("ours/home.py", source, *plugins), home)
    return home


def _keep_nothing(home: Path) -> None:
    with (home / FILE_NAME).open("a") as file:
        file.write("\n[store]\nkeep = false\n")


def _scanned(inputs: Path, home: Path) -> Path:
    """A copy of the folder after a scan. The second scan covers files whose modification times were
    too recent for the first."""
    known = inputs / "known"
    shutil.copytree(home, known)
    for _ in range(2):
        execute(_python("ours/scan.py"), known)
    return known


BENCHMARKS = {
    made.__name__: made
    for made in (
        small_files,
        typed,
        sandbox,
        queue,
        scan_100k,
        store_500b,
        store_8k,
        store_20m,
        help,
        oneshot,
        notice,
        sink_parquet,
        sink_parquet_replace,
        sink_sqlite,
        sink_sqlite_replace,
        stream,
        query,
        query_small,
    )
}
