"""Source roots and routing rules: what a person changes about which files are read, and by whom.

Each verb checks what it is given, writes it with its audit row, and wakes the daemon.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import delete, insert, select, update

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, routing, versions
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.models import RoutingRule, SourceRoot
from casparian_flow.db.routing import compile_pattern
from casparian_flow.db.states import ON_DELETE
from casparian_flow.db.visibility import Change
from casparian_flow.errors import ConfigError, NotFound, SourceError
from casparian_flow.services import architect, outputs
from casparian_flow.services.walk import Ignore

LIMIT_SECONDS = 86_400.0 * 366
"""Of a settle time and of a minimum age."""


class SourceOptions(NamedTuple):
    """Options of a source root; None leaves one as it is."""

    ignore: Sequence[str] | None = None
    """gitignore patterns, in place of the present ones."""
    settle_seconds: float | None = None
    done_file: str | None = None
    min_age_seconds: float | None = None
    on_delete: str | None = None
    """One of `ON_DELETE`."""

    def columns(self) -> dict[str, Any]:
        """The columns of `SourceRoot` that are to change.

        Raises:
            SourceError: one of them is not valid.
        """
        for pattern in self.ignore or ():
            _check_pattern(pattern)
        _check_seconds("settle time", self.settle_seconds, "2 is the default")
        _check_seconds("minimum age", self.min_age_seconds, "0 is the default")
        if self.done_file:
            _check_done_file(self.done_file)
        if self.on_delete not in (None, *ON_DELETE):
            raise SourceError(
                f"{self.on_delete!r} is neither keep nor retract",
                "keep: a deleted file's rows stay, which is the default; retract: they are hidden "
                "until it is back",
            )
        ignore = None if self.ignore is None else "\n".join(self.ignore)
        given = {**self._asdict(), "ignore": ignore}
        return {name: value for name, value in given.items() if value is not None}


class SourceChange(NamedTuple):
    """What became of a source root."""

    name: str
    options: list[str]
    """Those that were given."""
    gone: int = 0
    """Its deleted files, where it was said what becomes of their rows."""
    change: Change = Change()
    """What readers see of those since then."""
    notes: Sequence[str] = ()
    """A sentence for each sink that does not know of that yet."""


def add_source(
    ledger: Ledger, path: str, *, name: str | None = None, options: SourceOptions
) -> SourceChange:
    """Watch a directory, or watch a removed one again.

    Raises:
        SourceError: it cannot be a source root; the message says why.
    """
    path = os.path.abspath(path)
    _check_folder(path)
    _check_name(name)
    columns = options.columns()
    if name is not None:
        columns["name"] = name

    def work(connection: Connection) -> SourceChange:
        known = routing.every_root(connection)
        _check_place(path, name, known)
        # A removed one comes back whatever the directory is called now: its files are known.
        real = os.path.realpath(path)
        earlier = next((r.id for r in known if real == os.path.realpath(r.path)), None)
        if earlier is None:
            columns.update({"path": path, "ignore": columns.get("ignore", "")})
            statement: Any = insert(SourceRoot)
        else:
            statement = update(SourceRoot).where(SourceRoot.id == earlier)
        statement = statement.values(active=True, **columns).returning(SourceRoot.name)
        return _changed(connection, connection.execute(statement).scalar_one(), columns)

    added = ledger.change(
        work, lambda added: [Event("add-source", f"source {added.name}", columns)], scan=True
    )
    crashpoint("changes.source_added")
    return added._replace(notes=outputs.tell(ledger)) if added.change.any else added


def _changed(connection: Connection, name: str, columns: dict[str, Any]) -> SourceChange:
    """What these columns change, in the transaction that wrote them."""
    done = SourceChange(name, sorted(columns))
    if "on_delete" not in columns:
        return done
    gone = versions.count_gone(connection, name)
    return done._replace(gone=gone, change=versions.decide_gone(connection, name))


def set_source(ledger: Ledger, name: str, options: SourceOptions) -> SourceChange:
    """Change options of a source root, from its next scan on.

    What becomes of a deleted file's rows applies to files that are gone already.

    Raises:
        NotFound: no active source root has that name.
        SourceError: an option is not valid, or none was given.
    """
    columns = options.columns()
    if not columns:
        raise SourceError("nothing to change", "casparian source set --help")
    done = _update_root(ledger, "set-source", name, columns, lambda _path: columns)
    crashpoint("changes.source_set")
    return done._replace(notes=outputs.tell(ledger)) if done.change.any else done


def remove_source(ledger: Ledger, name: str) -> None:
    """Scan a root no more. Nothing is deleted; adding its directory again brings it back.

    Raises:
        NotFound: no active source root has that name.
    """
    _update_root(ledger, "remove-source", name, {"active": False}, lambda path: {"path": path})


def _update_root(
    ledger: Ledger,
    action: str,
    name: str,
    columns: dict[str, Any],
    detail: Callable[[str], dict[str, Any]],
) -> SourceChange:
    statement = (
        update(SourceRoot)
        .where(SourceRoot.name == name, SourceRoot.active)
        .values(**columns)
        .returning(SourceRoot.path)
    )

    def work(connection: Connection) -> tuple[str, SourceChange]:
        path: str | None = connection.execute(statement).scalar()
        if path is None:
            raise NotFound(f"no active source root is named {name!r}", "casparian source list")
        return path, _changed(connection, name, columns)

    def events(done: tuple[str, SourceChange]) -> list[Event]:
        return [Event(action, f"source {name}", detail(done[0]))]

    return ledger.change(work, events, scan=True)[1]


def add_rule(
    ledger: Ledger, pattern: str, tag: str, priority: int = 0, *, any_case: bool = True
) -> tuple[int, int]:
    """Add a routing rule and queue the jobs that follow; the rule's id, and how many jobs.

    Raises:
        ConfigError: not a glob, not a tag, or there already.
    """
    try:
        compile_pattern(pattern)
        pattern.encode()
        tag.encode()
    except (ValueError, re.error) as error:
        raise ConfigError(f"{pattern!r} cannot be a rule's pattern: {error}", "*.csv") from error
    if "," in tag or tag != tag.strip() or not tag:
        raise ConfigError(f"{tag!r} is not a tag", "a tag is one word without commas")
    values = {"pattern": pattern, "tag": tag, "priority": priority, "any_case": any_case}

    def work(connection: Connection) -> int:
        same = (RoutingRule.pattern == pattern, RoutingRule.tag == tag)
        if connection.execute(select(RoutingRule.id).where(*same)).first():
            raise ConfigError(f"there is already a rule {pattern} -> {tag}", "casparian rules list")
        statement = insert(RoutingRule).values(**values).returning(RoutingRule.id)
        return connection.execute(statement).scalar_one()

    def events(added: int) -> list[Event]:
        return [Event("add-rule", f"rule {added}", values)]

    rule_id = ledger.change(work, events, wake=False)
    queued = architect.queue_missing(ledger)
    if not queued:  # else it has woken the daemon
        ledger.wake()
    return rule_id, queued


def remove_rule(ledger: Ledger, rule_id: int) -> str:
    """Remove a routing rule; jobs it has queued stay. The rule as `PATTERN -> TAG`.

    Raises:
        NotFound: no rule has that id.
    """
    statement = (
        delete(RoutingRule)
        .where(RoutingRule.id == rule_id)
        .returning(RoutingRule.pattern, RoutingRule.tag)
    )

    def work(connection: Connection) -> dict[str, str]:
        row = connection.execute(statement).first()
        if row is None:
            raise NotFound(f"rule {rule_id} does not exist", "casparian rules list")
        return dict(row._mapping)

    removed = ledger.change(work, lambda row: [Event("remove-rule", f"rule {rule_id}", row)])
    return "{pattern} -> {tag}".format_map(removed)


def _check_folder(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SourceError(
            f"the path {path.encode('utf-8', 'backslashreplace').decode()} is not UTF-8",
            "rename that directory; the files in it may have any name",
        ) from None
    try:
        with os.scandir(path):
            pass
    except OSError as error:
        raise SourceError(
            f"{path} cannot be a source root: {error.strerror}",
            "choose a directory that exists and that you may read",
        ) from error


def _check_name(name: str | None) -> None:
    if name is not None and (not name.isprintable() or not name.strip() or "/" in name):
        raise SourceError(
            f"{name!r} is not a valid name for a source root", "use letters and digits"
        )


def _check_pattern(pattern: str) -> None:
    try:
        pattern.encode()
        Ignore(pattern)
    except ValueError as error:
        raise SourceError(
            f"{pattern!r} is not an ignore pattern: {error}", "write it as in a .gitignore"
        ) from error


def _check_seconds(what: str, seconds: float | None, usual: str) -> None:
    if seconds is not None and not 0 <= seconds <= LIMIT_SECONDS:
        raise SourceError(
            f"a {what} of {seconds:g} s is out of range", f"0 to {LIMIT_SECONDS:g} seconds; {usual}"
        )


def _check_done_file(done_file: str) -> None:
    """A file must not be its own marker, nor a marker lie in another directory."""
    rest = done_file.replace("{name}", "").replace("{stem}", "")
    fits = rest.strip(".") and done_file.isprintable() and not set("/{}") & set(rest)
    if not fits or len(done_file) > audit.TEXT_LIMIT:
        raise SourceError(
            f"{done_file[:80]!r} is not a valid done file name",
            "use '{name}.done', '{stem}.ok', or one name for a whole folder, such as '_SUCCESS'",
        )


def _check_place(path: str, name: str | None, known: Sequence[Any]) -> None:
    """No file may be in two roots: it would have two locations, and its rows come twice."""
    here = os.path.realpath(path)
    for root in known:
        there = os.path.realpath(root.path)
        if name == root.name and here != there:
            raise SourceError(
                f"the source root {root.path} already has the name {name}",
                "choose another name with --name",
            )
        if not root.active:
            continue
        if here == there:
            raise SourceError(
                f"{path} is already the source root {root.name}",
                f"casparian source set {root.name} --help   (to change its options)",
            )
        if os.path.commonpath([here, there]) in (here, there):
            inner, outer = ("is inside", "leave") if len(here) > len(there) else ("contains", "")
            raise SourceError(
                f"{path} {inner} the source root {root.name} ({root.path})",
                "its files are already scanned"
                if outer
                else f"casparian source remove {root.name}   (then add this one; its files "
                "count as new, and are processed again)",
            )
