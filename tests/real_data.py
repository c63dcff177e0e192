"""Real files and histories, kept beside the repository: they are too large, and not ours."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def real_data(kind: str) -> Path | None:
    """The folder `shared/data/<kind>` beside the repository or above; None where there is none."""
    folders = (folder / "shared" / "data" / kind for folder in REPOSITORY.parents)
    return next((folder for folder in folders if folder.is_dir()), None)


def absent(kind: str, unproven: str) -> str:
    """The reason of a test that cannot be without them: what is not proven for want of them."""
    return f"NOT PROVEN: {unproven} (there is no folder shared/data/{kind} beside the repository)"
