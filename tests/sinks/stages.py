"""What the tests of sinks share: sinks to hold to one contract, and outputs to publish."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import Sink
from casparian_flow.engine.sinks.base import Claim, Lineage
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import JobError
from casparian_flow.protocol import OutputPlan, Published, StagedOutput

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

    def check(self, claimed: Sequence[Claim]) -> list[str]:
        """What does not hold, in any of the topics' places."""
        topics = dict.fromkeys(claim.topic for claim in claimed)
        return [
            fault
            for topic in topics
            for fault in self.sink_of(topic).check([c for c in claimed if c.topic == topic])
        ]

    def stage(
        self, job: int = 1, attempt: str = "a1", key: str = "", topic: str = TOPIC,
        mode: str = "append", slot: str = "", ordinal: int = 1, split_bytes: int = 0,
        facts: dict[str, str] | None = None,
    ) -> Stage:  # fmt: skip
        plan = OutputPlan(
            topic=topic,
            uri=self.location_of(topic),
            location=self.location_of(topic),
            mode=mode,
            output_key=hashlib.sha256((key or f"job {job}").encode()).hexdigest(),
            slot=hashlib.sha256((slot or f"slot of {topic}").encode()).hexdigest(),
            ordinal=ordinal,
            split_bytes=split_bytes,
            facts=facts or {},
        )
        lineage = Lineage(
            file_version_id=job + 100, job_id=job, source_hash="ab" * 32, plugin_version="1.2.3"
        )
        return self.sink_of(topic).open_stage(plan, lineage, attempt)

    def sealed(self, columns: Any, job: int = 1, **named: Any) -> StagedOutput:
        """A sealed output of these columns: a batch, or a dict of lists."""
        batch = pa.record_batch(columns) if isinstance(columns, dict) else columns
        stage = self.stage(job, **named)
        try:
            stage.write(batch)
            return sinks.seal([stage])[0]
        except BaseException:
            stage.discard()
            raise

    def replacing(self, job: int, ordinal: int, columns: Any = None, **named: Any) -> StagedOutput:
        """A sealed output in mode replace; its only row has the job as `id`, unless told other."""
        named = {"mode": "replace", "attempt": f"a{job}", **named}
        return self.sealed(columns or {"id": [job]}, job, ordinal=ordinal, **named)

    def publish(self, *outputs: StagedOutput) -> list[Published | JobError]:
        return self.sink.publish(outputs)

    def show(self, *outputs: StagedOutput) -> list[Claim]:
        """Publish outputs that are taken; what the ledger would claim of them."""
        return claims(outputs, self.publish(*outputs))

    def rows(self, topic: str = TOPIC) -> list[dict[str, Any]]:
        """Every visible row of a topic; none where the topic is not there."""
        if self.scheme == "parquet":
            folder = self.home / "out" / topic
            if not folder.is_dir():
                return []
            files = sorted(str(file) for file in folder.rglob("*.parquet"))
            tables = [ds.dataset(file).to_table() for file in files]
            return [row for table in tables for row in table.to_pylist()]
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
                connection.execute(f"INSERT INTO {TOPIC} (id) VALUES (0)")

    def staged_files(self) -> list[str]:
        folder = self.sink.stage_folder
        return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def claims(outputs: Sequence[StagedOutput], found: Sequence[Published | JobError]) -> list[Claim]:
    """What the ledger would claim of these outputs, which were published."""
    made = []
    for output, seen in zip(outputs, found, strict=True):
        assert isinstance(seen, Published), seen
        made.append(
            Claim(
                topic=output.topic,
                output_key=output.output_key,
                job_id=output.job_id,
                target=seen.target,
                rows=seen.rows,
                digest=seen.digest,
            )
        )
    return made
