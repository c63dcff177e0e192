"""Every version whose bytes are kept is worked, whatever became of its file since."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from casparian_flow.config import Settings
from casparian_flow.db import jobs, views
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileVersion
from casparian_flow.engine import contents
from casparian_flow.errors import CasparianError
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services.idle import wait_until_idle
from casparian_flow.services.scan import scan
from casparian_flow.services.scout import scan_until_settled
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import WORK_SECONDS, started, work_off
from tests.factories import add_root
from tests.plugs import plugin, publish

ROWS_SINK = '[output]\ndefault_uri = "sqlite:///rows.sqlite3"\n'
LARGE = "." * contents.SMALL_BYTES
"""Makes a content too large for a row of the store."""
REWRITES = 50

SEES = plugin(
    'pattern="*.txt", topic="seen"',
    """
        with open(file_path) as file:
            content = file.read()
        name = os.path.basename(file_path)
        self.publish("seen", pa.table({"name": [name], "content": [content]}))
    """,
    imports="os",
)


def seen(settings: Settings) -> list[tuple[str, str]]:
    """(name, content) of every row that is committed."""
    with sqlite3.connect(settings.home / "rows.sqlite3") as rows:
        found: list[tuple[str, str]] = sorted(rows.execute("SELECT name, content FROM seen"))
    rows.close()
    return found


def recorded(tmp_path: Path, source: Path, extra: str = "") -> Settings:
    """Versions whose files were edited, deleted and renamed since, with a job each."""
    settings = write_config(tmp_path / "flow", ROWS_SINK + extra)
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        publish(ledger, settings, "sees", SEES, "1.0.0")
        for name, content in WHOLE:
            (source / name).write_text(content)
        scan(ledger, root)
    (source / "edited.txt").write_text("not what was recorded")
    (source / "deleted.txt").unlink()
    (source / "renamed.txt").rename(source / "other.name")
    return settings


WHOLE = [
    ("deleted.txt", "deleted, as it was recorded"),
    ("edited.txt", f"edited, as it was recorded{LARGE}"),
    ("renamed.txt", f"renamed, as it was recorded{LARGE}"),
]


def damage(settings: Settings) -> None:
    """Every content of the store, whichever form it has."""
    folder = settings.database.store_folder
    for file in folder.glob("??/*"):
        file.chmod(0o600)
        file.write_bytes(b"damaged")
    with closing(sqlite3.connect(folder / "small.sqlite3")) as rows, rows:
        rows.execute("UPDATE content SET bytes = 'damaged'")


@pytest.mark.parametrize("large", ["", "[guest]\ncopy_limit_bytes = 1\n"])
def test_edited_deleted_and_renamed_since_a_job_gets_the_bytes_under_the_name_they_had(
    tmp_path: Path, source: Path, large: str
) -> None:
    settings = recorded(tmp_path, source, large)
    assert work_off(settings) == {"COMPLETED": 3}
    assert seen(settings) == WHOLE
    with open_ledger(settings.database) as ledger:
        assert verify(settings, ledger).problems == []


@pytest.mark.parametrize("large", ["", "[guest]\ncopy_limit_bytes = 1\n"])
def test_a_damaged_content_is_named_and_the_file_used_where_that_has_the_bytes(
    tmp_path: Path, source: Path, large: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = recorded(tmp_path, source, large)
    (source / "edited.txt").write_text(WHOLE[1][1])
    damage(settings)
    with open_ledger(settings.database) as ledger:
        assert len(verify(settings, ledger).problems) == 3
    assert work_off(settings) == {"COMPLETED": 1, "SUPERSEDED": 2}
    assert seen(settings) == [WHOLE[1]]
    assert caplog.text.count("cannot use the bytes in the store") == 3
    with open_ledger(settings.database) as ledger:
        reasons = [job["reason"] for job in ledger.read(lambda c: views.jobs(c, 9, "SUPERSEDED"))]
    assert all("the store's cannot be used either" in words for words in reasons)


def test_a_superseded_job_can_be_retried_once_its_bytes_are_kept(
    tmp_path: Path, source: Path
) -> None:
    settings = recorded(tmp_path, source)
    shutil.rmtree(settings.database.store_folder)
    assert work_off(settings) == {"SUPERSEDED": 3}
    with open_ledger(settings.database) as ledger:
        superseded = sorted(ledger.read(lambda c: views.job_ids(c, ["SUPERSEDED"])))
        with pytest.raises(
            CasparianError, match="or SUPERSEDED with their version's bytes in the store"
        ):
            job_verbs.retry(ledger, superseded)
        (second := tmp_path / "second").mkdir()
        for name, content in WHOLE:
            (second / f"copy-of-{name}.bak").write_text(content)
        scan(ledger, add_root(ledger, second))
        assert job_verbs.retry(ledger, superseded) == 3
    assert work_off(settings) == {"COMPLETED": 3}
    assert seen(settings) == WHOLE


@pytest.mark.slow
def test_a_file_rewritten_while_its_versions_are_worked_gives_each_version_once(
    tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", ROWS_SINK)
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        publish(ledger, settings, "sees", SEES, "1.0.0")
        with started(settings):
            for n in range(REWRITES):
                (tmp_path / "new").write_text(f"content {n}")
                (tmp_path / "new").rename(source / "a.txt")
                scan_until_settled(ledger, root)  # it may lose a race with the daemon's own
            wait_until_idle(settings, ledger, WORK_SECONDS)
        assert ledger.read(jobs.counts) == {"COMPLETED": REWRITES}
        assert versions(ledger) == REWRITES
        assert verify(settings, ledger).problems == []
    wanted = [("a.txt", f"content {n}") for n in range(REWRITES)]
    assert Counter(seen(settings)) == Counter(wanted)


def versions(ledger: Ledger) -> int:
    """Versions of a.txt."""
    found: Sequence[int] = ledger.read(
        lambda c: (
            c.execute(select(FileVersion.id).where(FileVersion.size_bytes > 0)).scalars().all()
        )
    )
    return len(found)
