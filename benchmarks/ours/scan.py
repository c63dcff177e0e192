"""Scan the source roots of the configuration in the working directory once, as a script does."""

from __future__ import annotations

import json
import time
from pathlib import Path

from sqlalchemy.orm import Session

from casparian_flow.config import settings
from casparian_flow.db.access import get_engine
from casparian_flow.db.models import SourceRoot
from casparian_flow.services.scout import Scout


def main() -> None:
    engine = get_engine(settings.database)
    with Session(engine) as db:
        started, worked = time.perf_counter(), time.process_time()
        for root in db.query(SourceRoot).all():
            Scout(db).scan_source(root)
        figures = {
            "scan": time.perf_counter() - started,
            "scan, CPU": time.process_time() - worked,
        }
    engine.dispose()
    Path("figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
