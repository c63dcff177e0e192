"""Make the working directory a configuration: home.py SOURCE [PLUGIN]"""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy.orm import Session

from casparian_flow import config
from casparian_flow.db.access import get_engine, open_ledger
from casparian_flow.db.models import SourceRoot
from casparian_flow.engine import locking
from casparian_flow.engine.environments import EnvironmentStore
from casparian_flow.services import architect


def main(source: str, *plugins: str) -> None:
    Path(config.FILE_NAME).write_text('[database]\ndb_location = "casparian_flow.sqlite3"\n')
    settings = config.load()
    with open_ledger(settings.database) as ledger:
        with Session(get_engine(ledger.database)) as db:
            db.add(SourceRoot(path=source, settle_seconds=0.0))
            db.commit()
        for file in map(Path, plugins):
            code, manifest = architect.read_plugin(file)
            lock = locking.lock_dependencies(file)
            keys = config.keys_folder()
            signed = architect.sign(ledger, file, code, lock, manifest.name, "1.0.0", keys)
            architect.deploy(ledger, settings, signed)
            # Built here, so that no measured run builds the environment.
            limit = settings.guest.environments_bytes
            EnvironmentStore(config.cache_folder() / "envs", limit).lease(lock).release()


if __name__ == "__main__":
    main(*sys.argv[1:])
