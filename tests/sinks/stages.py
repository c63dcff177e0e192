"""What the tests of sinks share: sinks to hold to one contract, and outputs to publish."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import Sink
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import JobError
from casparian_flow.protocol import Output, Publication, State

TOPIC = "sales"


class Place:
    """A sink of one scheme in a temporary folder, and what a reader sees in it."""

    def __init__(self, scheme: str, home: Path) -> None:
        self.scheme = scheme
        self.home = home
        uri = "parquet://out" if scheme == "parquet" else "sqlite:///out/tables.sqlite3"
        self.location = sinks.resolve(uri, home)
        self.database = home / "out" / "tables.sqlite3"
        self.settings = DatabaseSettings(db_location=str(home / "ledger.sqlite3"))

    @property
    def sink(self) -> Sink:
        """Opened anew each time, as the Committer does."""
        return self.sink_of(TOPIC)

    def location_of(self, topic: str) -> str:
        """Where a topic goes."""
        return self.location

    def sink_of(self, topic: str) -> Sink:
        """What it is published to."""
        return sinks.open_sink(self.location_of(topic), self.settings)

    def check(self, outputs: Sequence[Output]) -> list[str]:
        """What does not hold, in any of the topics' places."""
        topics = dict.fromkeys(output.topic for output in outputs)
        return [
            fault
            for topic in topics
            for fault in self.sink_of(topic).check([o for o in outputs if o.topic == topic])
        ]

    def output(
        self, job: int = 1, key: str = "", topic: str = TOPIC, mode: str = "append",
        slot: str = "", ordinal: int = 1, state: State = State.CURRENT, **facts: Any,
    ) -> Output:  # fmt: skip
        """An output as it is claimed, with the state that it is to get.

        Args:
            slot: the file; each job has its own, unless told other.
            facts: other fields.
        """
        told = {
            "topic": topic,
            "uri": self.location_of(topic),
            "location": self.location_of(topic),
            "mode": mode,
            "output_key": hashlib.sha256((key or f"job {job} {topic}").encode()).hexdigest(),
            "source": "inbox",
            "path": (slot or f"{job}.csv").encode(),
            "ordinal": ordinal,
            "content_hash": "ab" * 32,
            "file_bytes": 10,
            "plugin": "tables",
            "plugin_version": "1.2.3",
            "artifact_hash": "cd" * 32,
            "version_id": job + 100,
            "job_id": job,
            "state": state,
        }
        return Output(**(told | facts))

    def stage(self, job: int = 1, attempt: str = "", **named: Any) -> Stage:
        """Start an output; `named` as for `output`."""
        output = self.output(job, **named)
        return self.sink_of(output.topic).open_stage(output, attempt or f"a{job}")

    def sealed(self, columns: Any, job: int = 1, **named: Any) -> Output:
        """A sealed output of these columns: a batch, or a dict of lists."""
        batch = pa.record_batch(columns) if isinstance(columns, dict) else columns
        stage = self.stage(job, **named)
        try:
            stage.write(batch)
            return sinks.seal([stage])[0]
        except BaseException:
            stage.discard()
            raise

    def replacing(self, job: int, ordinal: int, columns: Any = None, **named: Any) -> Output:
        """A sealed version of one file, in mode replace; its only row has the job as `id`, unless
        told other."""
        named = {"mode": "replace", "slot": "one.csv", **named}
        return self.sealed(columns or {"id": [job]}, job, ordinal=ordinal, **named)

    def publish(self, *outputs: Output, changes: Sequence[Output] = ()) -> list[Output | JobError]:
        """Publish outputs, those of a job together, and the changes with the last job; what became
        of each output."""
        jobs: dict[tuple[int, int], list[Output]] = {}
        seen: dict[str, int] = {}
        for output in outputs:  # a repeated output comes after the first one, and adopts it
            again = seen[output.output_key] = seen.get(output.output_key, -1) + 1
            jobs.setdefault((again, output.job_id), []).append(output)
        asked = [Publication(outputs=of) for of in jobs.values()]
        if changes:
            asked[-1] = Publication(outputs=asked[-1].outputs, changes=list(changes))
        ended: dict[int, Output | JobError] = {}
        for job, outcome in zip(asked, self.sink.publish(asked), strict=True):
            of = [outcome] * len(job.outputs) if isinstance(outcome, JobError) else outcome
            ended |= zip(map(id, job.outputs), of, strict=True)
        return [ended[id(output)] for output in outputs]

    def show(self, *outputs: Output, changes: Sequence[Output] = ()) -> list[Output]:
        """Publish outputs that are taken; the outputs as they are then."""
        return [published(outcome) for outcome in self.publish(*outputs, changes=changes)]

    def tell(self, state: State, *outputs: Output, **changed: Any) -> list[Output]:
        """Change the state of outputs; the outputs with it."""
        told = [msgspec.structs.replace(o, state=state, **changed) for o in outputs]
        self.sink.change(told)
        return told

    def rows(self, topic: str = TOPIC) -> list[dict[str, Any]]:
        """Every visible row of a topic; none where the topic is not there."""
        if self.scheme == "parquet":
            folder = self.home / "out" / topic
            if not folder.is_dir():
                return []
            files = sorted(str(file) for file in folder.rglob("*.parquet"))
            tables = [ds.dataset(file).to_table() for file in files]
            rows = [row for table in tables for row in table.to_pylist()]
            return sorted(rows, key=lambda row: row.get("_cf_job_id", 0))
        if not self.database.exists():
            return []
        with closing(sqlite3.connect(self.database)) as connection:
            connection.row_factory = sqlite3.Row
            if not connection.execute("SELECT 1 FROM pragma_table_info(?)", [topic]).fetchone():
                return []
            return [dict(row) for row in connection.execute(f'SELECT * FROM "{topic}"')]

    def intrude(self) -> None:
        """Add to the topic what is not ours."""
        if self.scheme == "parquet":
            pq.write_table(pa.table({"id": [0]}), self.home / "out" / TOPIC / "theirs.parquet")
        else:
            with closing(sqlite3.connect(self.database)) as connection, connection:
                connection.execute(f"INSERT INTO _cf_rows_{TOPIC} (_cf_output, id) VALUES (0, 0)")

    def damage(self, output: Output) -> None:
        """Take a row, or the file, of an output away."""
        if self.scheme == "parquet":
            (root,) = [Path(self.location.removeprefix("parquet://"))]
            for file in [*root.glob(f"{output.topic}/*"), *root.glob(".casparian/kept/*/*")]:
                if output.output_key.encode() in file.read_bytes():
                    file.unlink()
        else:
            with closing(sqlite3.connect(self.database)) as connection, connection:
                connection.execute(
                    f'DELETE FROM "_cf_rows_{output.topic}" WHERE rowid = (SELECT min(r.rowid) '
                    f'FROM "_cf_rows_{output.topic}" r JOIN _cf_outputs o ON o.id = r._cf_output '
                    "WHERE o.output_key = ?)",
                    [output.output_key],
                )

    def staged_files(self) -> list[str]:
        folder = self.sink.stage_folder
        return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def published(outcome: Output | JobError) -> Output:
    """An output that was published."""
    assert isinstance(outcome, Output), outcome
    return outcome
