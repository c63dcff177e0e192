"""What a Parquet sink holds, by name alone: nothing is opened, so that pyarrow is not imported.

`standing.py` says which names there are.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path

from casparian_flow.atomic import STATE_FOLDER
from casparian_flow.engine.sinks.base import KEY_DIGITS


def hidden_folder(root: Path, topic: str) -> Path:
    """Where a topic's retracted outputs are."""
    return root / STATE_FOLDER / "hidden" / topic


def outputs(folder: Path) -> Iterator[Path]:
    """What may be outputs in a topic's folder: files, and folders of parts.

    Raises:
        OSError: the folder is there and cannot be looked at.
    """
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = entry.name.removesuffix(".parquet")
        if len(name) == KEY_DIGITS and not name.startswith((".", "_")):
            yield entry


def unknown(root: Path, known: Container[str]) -> Iterator[tuple[Path, bool]]:
    """What may be outputs of the whole sink and be news, and whether it is hidden.

    What is named after a known output key is none; a name of mode replace is a slot's, and says
    nothing about what is there.

    Raises:
        OSError: a folder is there and cannot be looked at.
    """
    kept = hidden_folder(root, "")
    for folder in sorted([*root.glob("[!._]*/"), *kept.glob("*/")]):
        hidden = folder.parent == kept
        for path in outputs(folder):
            if hidden or path.name.removesuffix(".parquet") not in known:
                yield path, hidden
