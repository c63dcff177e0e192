"""The text of a view over the tables with a topic's rows; see `sql.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from casparian_flow.engine.sinks.base import LINEAGE


def united(
    tables: Mapping[str, Mapping[str, str]], rest: str, quote: Callable[[str], str],
    fold: Callable[[str], str], null: Callable[[str], str],
) -> str:  # fmt: skip
    """What a view selects from tables whose columns are united by name.

    A table of an earlier release has the lineage columns too: they keep their place among the
    columns.

    Args:
        tables: quoted name -> name and declared type of its columns. The first table's columns come
            first, and its names count.
        rest: what follows `FROM table AS r`; it has the entry of the output as `o`.
        quote: a name, quoted.
        fold: a name as the database compares it.
        null: a null of a declared type.
    """
    names: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for columns in tables.values():
        for name, kind in columns.items():
            names.setdefault(fold(name), name)
            kinds.setdefault(fold(name), kind)
    del names["_cf_output"]
    selects = []
    for table, columns in tables.items():
        own = {fold(name): name for name in columns}
        values = {
            folded: f"r.{quote(own[folded])} AS {quote(name)}"
            if folded in own
            else f"{null(kinds[folded])} AS {quote(name)}"
            for folded, name in names.items()
        }
        for name in LINEAGE:
            values[name] = f"o.{quote(name.removeprefix('_cf_'))} AS {quote(name)}"
        selects.append(f"SELECT {', '.join(values.values())} FROM {table} AS r {rest}")  # noqa: S608
    return " UNION ALL ".join(selects)
