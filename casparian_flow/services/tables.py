"""Tables: propose a contract for files, and find out what one would make of every record of them.

A table is a bundled reader that is published with a contract in its MANIFEST. Nothing here records
anything: files are surveyed and contracts are tried in guests (`services.trial`), and what comes
out is published like any plugin (`services.architect`).
"""

from __future__ import annotations

import glob
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from casparian_flow import bundled, config, contract, proposal
from casparian_flow.config import Settings
from casparian_flow.contract import Contract
from casparian_flow.db import plugins, tables, versions
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.routing import compile_pattern
from casparian_flow.errors import (
    CasparianError,
    Held,
    NotFound,
    PluginError,
    PublishConflict,
    counted,
)
from casparian_flow.path_patterns import placeholders
from casparian_flow.security.choices import Choices
from casparian_flow.services import trial
from casparian_flow.services.table_contracts import Said, changed, check_patterns, read
from casparian_flow.services.trial import Balance, Subject, Trials, Tried

if TYPE_CHECKING:
    import pyarrow as pa

    from casparian_flow.proposal import Proposal

WORKBOOKS = (".xlsx", ".xlsm", ".xltx", ".xltm")
"""Files of these names are read by `excel_sheets`, all others by `delimited`."""


# The files.


def matching(ledger: Ledger, patterns: Sequence[str], source: str = "") -> list[Any]:
    """The current versions of the files that a contract's patterns name.

    Args:
        source: only those of this source root.

    Raises:
        PluginError: a pattern cannot be used.
        NotFound: there is none; the hint says what to type.
    """
    try:
        wanted = [compile_pattern(contract.routing_glob(pattern)) for pattern in patterns]
    except ValueError as error:
        raise PluginError(f"the files of the table: {error}", "write it like 'sales_*.csv'") from (
            error
        )
    roots = ledger.read(versions.active_roots)
    if source and source not in {root.name for root in roots}:
        raise NotFound(f"no source root is named {source!r}", "casparian source list")

    def work(connection: Connection) -> list[Any]:
        return [
            row
            for row in tables.current(connection, source)
            for path in [versions.route_text(row.path)]
            if any(each.match(path) for each in wanted)
        ]

    found = ledger.read(work)
    if found:
        return found
    raise _not_found(patterns, roots)


def _not_found(patterns: Sequence[str], roots: Sequence[Any]) -> NotFound:
    """The error for patterns that match no known file, with what to type."""
    shown = ", ".join(patterns)
    on_disk = next(filter(None, map(_on_disk, patterns)), "")
    for root in roots:
        if on_disk.startswith(f"{root.path.rstrip('/')}/"):
            below = os.path.relpath(os.path.dirname(on_disk), root.path)
            path = os.path.normpath(os.path.join(below, os.path.basename(patterns[0])))
            return NotFound(
                f"no file is known as {shown}; patterns begin at the source root {root.name} "
                f"({root.path})",
                f"casparian scan; casparian table add NAME '{path}'",
            )
    if on_disk or not roots:
        folder = os.path.dirname(patterns[0]) or "DIR"
        return NotFound(
            f"no file is known as {shown}: "
            + (f"{on_disk} is below no source root" if on_disk else "there is no source root"),
            f"casparian source add {folder}; casparian scan",
        )
    folders = ", ".join(f"{root.name} ({root.path})" for root in roots)
    return NotFound(
        f"no file matches {shown} below {folders}",
        "casparian scan   (records new files; casparian files lists them)",
    )


def _on_disk(pattern: str) -> str:
    """A file that a pattern names from here; empty if there is none."""
    found = next(glob.iglob(contract.routing_glob(pattern), recursive=True), "")
    return os.path.abspath(found) if found else ""


def reader_of(rows: Iterable[Any]) -> str:
    """The bundled plugin that reads these files.

    Raises:
        PluginError: one reads some of them, another the rest.
    """
    kinds: dict[str, str] = {}
    for row in rows:
        is_book = row.rel_path.lower().endswith(WORKBOOKS)
        kinds.setdefault("excel_sheets" if is_book else "delimited", row.rel_path)
    if len(kinds) > 1:
        raise PluginError(
            f"one table cannot have both workbooks and text: {', '.join(kinds.values())}",
            "make a table for each, with patterns such as '*.xlsx' and '*.csv'",
        )
    return next(iter(kinds))


# Surveys and trials.


class Facts:
    """Takes the one row that a survey publishes."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        for text in batch.column("facts").to_pylist():
            self.facts = json.loads(text)


class Kind(NamedTuple):
    """Rejects of one kind, with the first of them."""

    number: int
    file: str
    line: int | None
    reason: str


class Judged:
    """Counts rows, and rejects by their kind.

    Args:
        table: the topic of rows.
        records: whether to remember which records were rejected.
    """

    def __init__(self, table: str, records: bool = False) -> None:
        self._table = table
        self.rows = 0
        self.rejects = 0
        self.kinds: Counter[tuple[str, str]] = Counter()
        """(column, rule) -> number."""
        self.first: dict[tuple[str, str], dict[str, Any]] = {}
        self.records: array[int] | None = array("q") if records else None

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        if topic == self._table:
            self.rows += batch.num_rows
            return
        self.rejects += batch.num_rows
        columns, rules = (batch.column(name).to_pylist() for name in ("column", "rule"))
        kinds = [(column or "", rule or "") for column, rule in zip(columns, rules, strict=True)]
        self.kinds.update(kinds)
        for number, kind in enumerate(kinds):
            if kind not in self.first:
                self.first[kind] = batch.slice(number, 1).to_pylist()[0]
        if self.records is not None:
            self.records.extend(batch.column("record").to_pylist())


class Of(NamedTuple):
    """What a contract would make of one file."""

    file: str
    version_id: int
    output: Judged
    balance: Balance
    held: str = ""
    """Why a person must decide; its job would be held."""
    error: str = ""
    """Why its job would fail."""

    @property
    def kinds(self) -> list[Kind]:
        """Its rejects by kind, the commonest first."""
        return _kinds([self])


def _kinds(files: Iterable[Of]) -> list[Kind]:
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Kind] = {}
    for of in files:
        counts.update(of.output.kinds)
        for kind, row in of.output.first.items():
            first.setdefault(kind, Kind(0, of.file, row["line"], row["reason"] or ""))
    return [first[kind]._replace(number=number) for kind, number in counts.most_common()]


class Outcome(NamedTuple):
    """What a contract would make of all files."""

    files: list[Of]

    @property
    def good(self) -> list[Of]:
        """The files whose jobs would complete."""
        return [of for of in self.files if not of.held and not of.error]

    @property
    def held(self) -> list[Of]:
        """The files whose jobs would be held."""
        return [of for of in self.files if of.held]

    @property
    def failed(self) -> list[Of]:
        """The files whose jobs would fail."""
        return [of for of in self.files if of.error]

    @property
    def not_taken(self) -> list[Of]:
        """Both."""
        return [*self.held, *self.failed]

    @property
    def total(self) -> Balance:
        """Over the files whose jobs would complete."""
        reasons: Counter[str] = Counter()
        for of in self.good:
            for part in filter(None, of.balance.reasons.split(", ")):
                name, _, number = part.rpartition(" ")
                reasons[name] += int(number.replace(",", ""))
        good = [of.balance for of in self.good]
        return Balance(
            sum(each.read for each in good),
            sum(each.published for each in good),
            sum(each.rejected for each in good),
            sum(each.skipped for each in good),
            ", ".join(f"{name} {number:,}" for name, number in reasons.items()),
        )

    @property
    def kinds(self) -> list[Kind]:
        """Their rejects by kind, the commonest first."""
        return _kinds(self.good)


class Found(NamedTuple):
    """What the versions of a table speak for."""

    files: list[str]
    proposal: Proposal
    facts: list[dict[str, Any]]
    """Of each file."""
    dialect: dict[str, str]
    """Words of the contract's dialect: what was said, and what is the same in all files."""
    empty: list[str]
    """Files with no rows and no columns."""

    @property
    def words(self) -> dict[str, Mapping[str, Any]]:
        """Column -> its words in a contract; those that only some files have come last."""
        every = {each.name: each.words for each in self.proposal.columns}
        for version in self.proposal.differs:
            for column in proposal.merge([_columns(self.facts[version])]).columns:
                every.setdefault(column.name, column.words)
        return every

    @property
    def missing(self) -> dict[str, int]:
        """Column -> how many values are missing."""
        return {each.name: sum(each.missing.values()) for each in self.proposal.columns}

    @property
    def why(self) -> dict[str, str]:
        """Column -> what speaks for its type."""
        return {each.name: each.why for each in self.proposal.columns}

    @property
    def head(self) -> str:
        """How the files are written, in short."""
        encodings = sorted({each.get("encoding", "") for each in self.facts} - {""})
        delimiters = sorted({each["dialect"].get("delimiter", "") for each in self.facts} - {""})
        lines = sorted({each.get("header_line") or 0 for each in self.facts} - {0})
        words = [" or ".join(encodings), " or ".join(map(repr, delimiters))]
        if lines:
            shown = str(lines[0]) if len(lines) == 1 else f"{lines[0]} to {lines[-1]}"
            words.append(f"header in line {shown}")
        words += [f"{w} {self.dialect[w]!r}" for w in ("footer", "control") if w in self.dialect]
        return ", ".join(filter(None, words))

    @property
    def differ(self) -> list[str]:
        """Which files have other columns than the proposal, a line each."""
        lines = [f"{file} has no rows: it is left out" for file in self.empty]
        for version, (more, less) in self.proposal.differs.items():
            words = [f"has besides: {', '.join(more)}"] if more else []
            words += [f"lacks: {', '.join(less)}"] if less else []
            lines.append(f"{self.files[version]} {'; '.join(words)}")
        return lines


def _columns(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the facts of a version those that a proposal is made of."""
    return {**facts["columns"], "dialect": facts["dialect"]}


def _shared(facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What all files say of their dialect.

    The encoding is left to be found in each file: Windows-1252 would read UTF-8 as well, wrongly
    and without a word.
    """
    first = dict(facts[0]["dialect"])
    return {
        word: str(value)
        for word, value in first.items()
        if word != "encoding" and all(each["dialect"].get(word) == value for each in facts)
    }


def _with_columns(rows: Sequence[Any], facts: list[Any]) -> tuple[list[str], list[Any], list[str]]:
    """Names and facts of the files that have columns, and the names of the others.

    Raises:
        CasparianError: none has.
    """
    names = [f"{row.source}/{row.rel_path}" for row in rows]
    full = [at for at, each in enumerate(facts) if each["columns"]["columns"]]
    if not full:
        raise CasparianError("all of these files are empty", "choose files that have rows")
    empty = [name for at, name in enumerate(names) if at not in full]
    return [names[at] for at in full], [facts[at] for at in full], empty


def _suggested(facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Regular expressions for the header and the footer, where all files that have one agree."""
    found = {}
    for word in ("header", "footer"):
        said = {each.get("suggest", {}).get(word, "") for each in facts} - {""}
        if len(said) == 1:
            found[word] = said.pop()
    return found


class Workshop:
    """Surveys files and tries contracts on them.

    Args:
        lock: of the reader's dependencies; empty: they are locked at first use.
        say: is given a line before what takes time.
        progress: is given the number of files done, of all, and what is done with them.
    """

    def __init__(
        self,
        settings: Settings,
        lock: str = "",
        say: Callable[[str], None] = lambda _: None,
        progress: Callable[[int, int, str], None] = lambda *_: None,
    ) -> None:
        self._settings = settings
        self._locks = {"": lock} if lock else {}
        self._say = say
        self._progress = progress

    def subject(self, table: str, reader: str, literal: Mapping[str, Any]) -> Subject:
        """A reader with a contract in its MANIFEST, ready to be tried or signed."""
        is_survey = contract.is_survey(literal)
        name = "survey" if is_survey else table
        patterns = ["*"] if is_survey else [contract.routing_glob(f) for f in literal["files"]]
        uris = list(literal.get("sinks", ()))
        choices = Choices(
            name=table, patterns=list(dict.fromkeys(patterns)), topics=topics_of(name),
            contract=literal, sinks={topic: uris for topic in topics_of(name) if uris},
        )  # fmt: skip
        lock = self._locks.get("") or self._locks.get(reader, "")
        file = bundled.path(reader)
        made = trial.unpublished(self._settings, file, choices, lock, self._say)
        self._locks[reader] = made.artifact.lock
        return made

    def subject_of(self, wanted: Contract) -> Subject:
        """A table, ready to be tried or signed.

        Raises:
            PluginError: one of its regular expressions is none.
        """
        check_patterns(wanted)
        return self.subject(wanted.table, wanted.reader, contract.literal(wanted))

    def facts(self, table: str, rows: Sequence[Any], said: Said) -> list[dict[str, Any]]:
        """The facts of each version, from a look at all of its bytes.

        Raises:
            CasparianError: one cannot be read.
        """
        literal = {"survey": {"dialect": dict(said.dialect), "hints": said.hints}}
        subject = self.subject(table, reader_of(rows), literal)
        tried = self._run(subject, rows, Facts, "surveyed")
        for each in tried:
            if each.error:
                raise CasparianError(
                    f"{each.name} cannot be read: {each.error.message}",
                    "say how it is written (casparian table add --help), or leave it out with a "
                    "narrower pattern",
                )
        return [each.output.facts for each in tried]

    def survey(self, table: str, rows: Sequence[Any], said: Said) -> Found:
        """What the versions speak for, all together.

        Where lines above or below the table are found and nothing was said of them, the files are
        surveyed once more without these lines.

        Raises:
            CasparianError: one cannot be read.
        """
        names, facts, empty = _with_columns(rows, self.facts(table, rows, said))
        dialect = {**_shared(facts), **said.dialect}
        found = {word: text for word, text in _suggested(facts).items() if word not in dialect}
        if found and "header_line" not in dialect:
            dialect |= found
            if "footer" in found:
                facts = self.facts(table, rows, said._replace(dialect=dialect))
                _, facts, _ = _with_columns(rows, facts)
        columns = [_columns(each) for each in facts]
        return Found(names, proposal.merge(columns), facts, dialect, empty)

    def try_out(self, subject: Subject, rows: Sequence[Any], *, records: bool = False) -> Outcome:
        """What a table would make of every version.

        Args:
            records: remember which records of each were rejected.
        """
        table = subject.artifact.topics[0]
        tried = self._run(subject, rows, lambda: Judged(table, records), "checked")
        return Outcome([_judged(each) for each in tried])

    def _run(
        self, subject: Subject, rows: Sequence[Any], collector: Callable[[], Any], what: str
    ) -> list[Tried[Any]]:
        files = [trial.of_version(self._settings, row) for row in rows]
        done = 0

        def ended(_: Tried[Any]) -> None:
            nonlocal done
            done += 1
            self._progress(done, len(files), what)

        self._progress(0, len(files), what)
        with Trials(self._settings, config.cache_folder(), subject) as trials:
            return trials.run(files, collector, ended)


def topics_of(table: str) -> list[str]:
    """A table's topics: rows and rejects."""
    return [table, f"{table}_rejects"]


def _judged(tried: Tried[Judged]) -> Of:
    """
    Raises:
        CasparianError: the reader's own count is not what it sent.
    """
    output, error = tried.output, tried.error
    told = trial.balance(tried.log) or Balance()
    if error is None and told[1:3] != (output.rows, output.rejects):
        raise CasparianError(
            f"{tried.name}: {output.rows:,} rows and {output.rejects:,} rejects came, but the "
            f"reader counted {told.published:,} and {told.rejected:,}",
            "report this as a bug of the bundled reader, with the file's header",
        )
    held = error.message.removeprefix("held: ") if isinstance(error, Held) else ""
    failed = error.message if error and not held else ""
    return Of(tried.name, tried.file.version_id, output, told, held, failed)


def propose(table: str, patterns: Sequence[str], reader: str, found: Found, said: Said) -> Contract:
    """The contract that a survey speaks for, with what a person says of it.

    Raises:
        PluginError: what was said cannot be used.
    """
    placed = [placeholders(each) for each in patterns]
    columns: list[Mapping[str, Any]] = [each.words for each in found.proposal.columns]
    for name in dict.fromkeys(name for each in placed for name in each):
        optional = name not in said.key and not all(name in each for each in placed)
        more = {"optional": True} if optional else {}
        columns.append({"name": name, "type": "text", "from": "path", **more})
    literal = {"table": table, "reader": reader, "files": list(patterns),
               "dialect": found.dialect, "columns": columns}  # fmt: skip
    return changed(read(literal), said)


# Beside other plugins.


def check_free(ledger: Ledger, table: str) -> None:
    """
    Raises:
        PublishConflict: a table, a plugin or a topic has the name.
    """
    if ledger.read(lambda c: plugins.versions(c, table, stubs=True)):
        if ledger.read(lambda c: tables.contract_of(c, table)):
            raise PublishConflict(
                f"there is a table {table}",
                f"casparian table show {table}; casparian table set {table} ...   (changes it)",
            )
        raise PublishConflict(
            f"there is a plugin {table}, which is no table", "choose another name"
        )
    for name, rows in ledger.read(plugins.topics).items():
        if taken := {row.topic_name.lower() for row in rows} & {
            topic.lower() for topic in topics_of(table)
        }:
            raise PublishConflict(
                f"plugin {name} writes to a topic {min(taken)}: its rows would be among those of "
                "the table",
                "choose another name",
            )


def others(ledger: Ledger, wanted: Contract, rows: Sequence[Any]) -> list[str]:
    """Which plugins have processed a table's files, and what becomes of their rows; a line each."""
    ids = [row.version_id for row in rows]
    numbers = ledger.read(lambda c: tables.worked_by_others(c, wanted.table, ids))
    lines = []
    for plugin, number in numbers.items():
        some = f"{plugin} has processed {counted(number, 'file')} of these: the rows it gave stay"
        found = ledger.read(partial(plugins.choose, name=plugin, version=None))
        if plugins.manifest_of(found.manifest).yields_to_tables:
            lines.append(f"{some}, and from now on these files go to {wanted.table} only")
        elif plugin in bundled.names():
            lines.append(
                f"{some}, and it goes on getting these files until you publish its present "
                f"release: casparian publish {plugin}"
            )
        else:
            lines.append(f"{some}, and it goes on getting these files")
    return lines
