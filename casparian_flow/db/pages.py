"""Rows of a list that may be long: those that were asked for, and how many there are."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, text

Row = dict[str, Any]

_BOOLEANS = {"active", "current", "latest", "may_be_empty"}


class Page(list[Row]):
    """Rows that were asked for.

    Attributes:
        total: how many there are without a limit.
    """

    def __init__(self, rows: list[Row], total: int) -> None:
        super().__init__(rows)
        self.total = total


def page(
    connection: Connection, query: str, limit: int | None, *, counted: str = "", **values: Any
) -> Page:
    """The first rows of a query; they are counted only where that is not all of them.

    Args:
        limit: None for every row.
        counted: a query with as many rows, where that is less work.
    """
    if limit is None:
        found = rows(connection, query, **values)
        return Page(found, len(found))
    found = rows(connection, f"{query} LIMIT :page", page=limit + 1, **values)
    if len(found) <= limit:
        return Page(found, len(found))
    total = text(f"SELECT count(*) FROM ({counted or query})")  # noqa: S608  ours
    return Page(found[:limit], connection.execute(total, values).scalar_one())


def rows(connection: Connection, query: str, **values: Any) -> list[Row]:
    """Every row of a query."""
    found = connection.execute(text(query), values).mappings()
    return [{name: _value(name, value) for name, value in row.items()} for row in found]


def _value(name: str, value: Any) -> Any:
    """SQLite has neither times nor truth values; the names of our columns tell them."""
    if name in _BOOLEANS:
        return bool(value)
    if value is None or not name.endswith("_at"):
        return value
    return f"{str(value).replace(' ', 'T')}Z"
