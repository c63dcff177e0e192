"""`casparian table`: typed tables without code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import ExitCode, counted

if TYPE_CHECKING:
    from casparian_flow.cli.context import Here
    from casparian_flow.contract import Contract
    from casparian_flow.services.table_changes import Change, Redone
    from casparian_flow.services.table_contracts import Said
    from casparian_flow.services.tables import Found, Kind, Outcome, Workshop
    from casparian_flow.services.trial import Subject

SHOWN = 20
"""At most so many files are named."""

app = context.group("Make typed tables of files, without code.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The table's name.")]
Types = Annotated[
    list[str] | None,
    typer.Option(
        "--type",
        metavar="COL=TYPE",
        help="A column's type, such as date, decimal(18,2) or boolean:yes/no; repeatable.",
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="COL=FMT",
        help="How a column's dates and times are written, such as %d.%m.%Y; repeatable.",
    ),
]
Decimal = Annotated[
    str | None, typer.Option(metavar="CHAR", help="The decimal character of all numbers.")
]
Missing = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN", help="A text that means that there is no value; repeatable."),
]
Key = Annotated[
    list[str] | None,
    typer.Option(metavar="COL", help="A column of the key, unique in each file; repeatable."),
]
Header = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="The header is the first line that this matches."),
]
Footer = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="From the line that this matches on, nothing is read."),
]
Control = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="A line with totals to check, in groups: (?P<rows>...) and (?P<sum_COL>...).",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Such as cp1250, where the files' bytes do not say it."),
]
Sheet = Annotated[str | None, typer.Option(metavar="NAME", help="The sheet of a workbook.")]
To = Annotated[
    list[str] | None,
    typer.Option("--to", metavar="URI", help="A sink of the table; repeatable."),
]
Source = Annotated[str | None, typer.Option(metavar="NAME", help="Only files of this source root.")]
Drift = Annotated[
    str | None,
    typer.Option(
        metavar="hold|rescue|evolve",
        help="What becomes of a file with other columns: it waits for a person; new cells go into "
        "the column _extra; or new columns are added as text. Default: hold.",
    ),
]
MaxRejects = Annotated[
    str | None,
    typer.Option(
        metavar="N|P%", help="A file with more rejects than this is refused whole; default: none."
    ),
]
Lines = Annotated[
    bool, typer.Option("--lines", help="Give every row its line in the file, as _cf_line.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print all of it, and publish nothing.")]


@app.command()
def add(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The table's name; not with --from.")
    ] = None,
    globs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="GLOB...",
            help="Its files. With a / it begins at the source root; {region}/*.csv makes a column "
            "of a folder's name.",
        ),
    ] = None,
    source: Source = None,
    to: To = None,
    types: Types = None,
    formats: Formats = None,
    decimal: Decimal = None,
    missing: Missing = None,
    key: Key = None,
    encoding: Encoding = None,
    header: Header = None,
    footer: Footer = None,
    control: Control = None,
    sheet: Sheet = None,
    drift: Drift = None,
    max_rejects: MaxRejects = None,
    lines: Lines = False,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="The contract, as `casparian table show --toml` has it."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Make a table of the files that match.

    Reads every byte of their current versions in guests, proposes a type for each column, says what
    would be published, rejected and skipped, and asks. What is agreed is published like a plugin,
    signed by you: from then on the contract judges every file.
    """
    from casparian_flow.services import table_contracts as contracts
    from casparian_flow.services import tables

    said = _said(
        types, formats, decimal, missing, key, to, source=source, drift=drift,
        max_rejects=max_rejects, lines=lines, encoding=encoding, header=header, footer=footer,
        control=control, sheet=sheet,
    )  # fmt: skip
    if (from_file is None) == (not name or not globs):
        raise typer.BadParameter("give a NAME and GLOBs, or --from FILE")
    with context.opened(ctx) as here, _workshop(here) as workshop:
        if from_file:
            wanted = contracts.changed(_document(from_file, name), said)
        table = wanted.table if from_file else str(name)
        tables.check_free(here.ledger, table)
        contracts.check_said(here.settings, here.ledger, table, said)
        patterns = wanted.files if from_file else list(globs or ())
        if len(patterns) > 1 and not any(set("*?[{") & set(pattern) for pattern in patterns):
            context.note(
                "note: these are the names of single files, and no later file will match; did the "
                "shell expand a pattern? Put it in quotes"
            )
        rows = tables.matching(here.ledger, patterns, wanted.source if from_file else said.source)
        if not from_file:
            wanted = _proposed(workshop, table, patterns, rows, said)
        subject = workshop.subject_of(wanted)
        outcome = workshop.try_out(subject, rows)
        _print_outcome(outcome)
        _check_usable(wanted, outcome)
        for words in tables.others(here.ledger, wanted, rows):
            context.say(words)
        _publish(here, subject, "1.0.0", dry_run=dry_run, yes=yes)


def _said(
    types: Sequence[str] | None,
    formats: Sequence[str] | None,
    decimal: str | None,
    missing: Sequence[str] | None,
    key: Sequence[str] | None,
    to: Sequence[str] | None,
    *,
    source: str | None = None,
    drift: str | None = None,
    max_rejects: str | None = None,
    lines: bool = False,
    **dialect: str | None,
) -> Said:
    from casparian_flow.services.table_contracts import Said

    return Said(
        types=_pairs("--type", types),
        formats=_pairs("--format", formats),
        decimal=decimal or "",
        missing=missing or (),
        key=key or (),
        dialect={word: value for word, value in dialect.items() if value is not None},
        source=source or "",
        sinks=to or (),
        drift=drift or "",
        max_rejects=max_rejects or "",
        lines=lines,
    )


def _pairs(option: str, written: Sequence[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in written or ():
        # A name may have a =; a type and a format have none.
        column, sign, value = text.rpartition("=")
        if not column or not sign or not value:
            raise typer.BadParameter(f"{option} is COL=..., not {text[:60]!r}")
        if column in pairs:
            raise typer.BadParameter(f"{option} {column[:60]}= is given twice")
        pairs[column] = value
    return pairs


def _document(file: Path, name: str | None) -> Contract:
    from casparian_flow.contract import ContractError
    from casparian_flow.errors import PluginError
    from casparian_flow.services import table_contracts as contracts
    from casparian_flow.services import table_documents

    try:
        wanted = table_documents.from_toml(file.read_text("utf-8"))
    except ContractError as error:
        raise contracts.refused(error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"cannot read {file}: {error}", "check the path") from error
    if name and name != wanted.table:
        raise PluginError(
            f"{file} is of table {wanted.table}, not of {name}",
            f"casparian table add --from {file}",
        )
    return wanted


@contextlib.contextmanager
def _workshop(here: Here, lock: str = "") -> Iterator[Workshop]:
    """A workshop that says on standard error how far it is."""
    from casparian_flow.services.tables import Workshop

    with context.line(chatty=True) as line:

        def progress(done: int, number: int, what: str) -> None:
            if done < number:
                line.show(f"{what} {done:,} of {counted(number, 'file')}")
            else:
                line.clear()

        yield Workshop(here.settings, lock, line.show, progress)


def _proposed(
    workshop: Workshop, name: str, patterns: Sequence[str], rows: Sequence[Any], said: Said
) -> Contract:
    """Survey the files, and print what they speak for."""
    from casparian_flow.services import tables

    found = workshop.survey(name, rows, said)
    wanted = tables.propose(name, patterns, tables.reader_of(rows), found, said)
    records = counted(found.proposal.records, "record")
    context.say(f"read {counted(len(rows), 'file')}, {records}, every one   ({found.head})")
    _print_columns(wanted, found)
    return wanted


def _print_columns(wanted: Contract, found: Found) -> None:
    rows = [
        (
            column.name,
            column.type,
            f"{found.missing.get(column.name, 0):,}",
            "from the path" if column.from_path else found.why.get(column.name, ""),
        )
        for column in wanted.columns
    ]
    context.table(["column", "type", "missing", "why"], rows)
    for words in found.differ[:SHOWN]:
        context.say(words)


def _print_outcome(outcome: Outcome) -> None:
    total = outcome.total
    reasons = f" ({total.reasons})" if total.reasons else ""
    if outcome.good:
        context.say(
            f"of {total.read:,} read: {total.published:,} would be published, {total.rejected:,} "
            f"rejected, {total.skipped:,} skipped{reasons}"
        )
        _print_kinds(outcome.kinds)
    else:
        context.say("nothing would be published")
    for words, files in (("would be held", outcome.held), ("would fail", outcome.failed)):
        for each in files[:SHOWN]:
            context.say(f"  {words}: {each.file}: {each.held or each.error}")
            _print_kinds(each.kinds)
        if len(files) > SHOWN:
            context.say(f"  and {len(files) - SHOWN:,} more {words}")


def _print_kinds(kinds: Sequence[Kind]) -> None:
    """Rejects of each kind, with the first of them."""
    for kind in kinds[:SHOWN]:
        line = f" line {kind.line:,}" if kind.line is not None else ""
        context.say(f"  {kind.number:>8,}  {kind.reason}   {kind.file}{line}")
    if len(kinds) > SHOWN:
        context.say(f"  and {counted(len(kinds) - SHOWN, 'more kind')} of rejects")


def _check_usable(wanted: Contract, outcome: Outcome) -> None:
    """
    Raises:
        CasparianError: no file would give a row.
    """
    from casparian_flow.errors import CasparianError

    if not outcome.total.published:
        raise CasparianError(
            f"no row would be published to table {wanted.table}: nothing was changed",
            "look at the reasons above, and say more with --type, --format, --encoding, --header, "
            "--footer",
        )


def _agreed(question: str, yes: bool) -> bool:
    """Ask on a terminal.

    Raises:
        CasparianError: there is none, and --yes was not given.
    """
    from casparian_flow.errors import CasparianError

    if yes:
        return True
    if not sys.stdin.isatty():
        raise CasparianError(
            f"not asked, for there is no terminal: {question}", "the same command with --yes"
        )
    return typer.confirm(question, default=False)


def _publish(here: Here, subject: Subject, version: str, *, dry_run: bool, yes: bool) -> None:
    """Ask, sign and deploy."""
    from casparian_flow import bundled, config
    from casparian_flow.cli import plugins
    from casparian_flow.db.trust import person
    from casparian_flow.security import keys, signing
    from casparian_flow.services import architect

    made = subject.artifact
    folder = config.keys_folder()
    if not dry_run:
        key = signing.key_id(keys.local_key(folder).verify_key.encode())[:12]
        words = f"publish table {made.name} {version}, signed by {key} of {person()}?"
        if not _agreed(words, yes):
            context.note("nothing was published")
            raise typer.Exit(ExitCode.FAILED)
    auth, token = plugins.sign_in(here)
    file = bundled.folder() / subject.file_name
    message = architect.sign(
        here.ledger, file, made.source, made.lock, made.name, version, folder,
        auth=auth, token=token, dry_run=dry_run,
    )  # fmt: skip
    context.say(plugins.deploy(here, message))


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every table."""
    import json

    from casparian_flow.db import tables

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(tables.listed)
    for row in rows:
        files = json.loads(row["files"] or "[]")
        row["files"] = files if as_json else ", ".join(files)
    columns = "table version active columns versions held files"
    hint = "no tables\n  try: casparian table add NAME GLOB"
    context.listing(rows, as_json, columns, hint)


@app.command()
def show(
    ctx: typer.Context,
    name: Name,
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the contract, as --from takes it.")
    ] = False,
    table_schema: Annotated[
        bool, typer.Option("--table-schema", help="Print it as a Table Schema, in JSON.")
    ] = False,
    odcs: Annotated[
        bool, typer.Option("--odcs", help="Print it as an Open Data Contract (ODCS), in JSON.")
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """Show a table's contract, its versions and its files."""
    from casparian_flow import contract
    from casparian_flow.db import tables
    from casparian_flow.services import table_changes
    from casparian_flow.services.table_contracts import read

    most = context.wanted(limit, every)
    if sum([toml, table_schema, odcs, as_json]) > 1:
        raise typer.BadParameter("use one of --toml, --table-schema, --odcs and --json")
    with context.opened(ctx) as (_, ledger):
        literal = table_changes.contract_of(ledger, name)
        history = ledger.read(lambda c: tables.history(c, name))
        files = ledger.read(lambda c: tables.files(c, name, most))
    given = read(literal)
    if toml or table_schema or odcs:
        from casparian_flow.services import table_documents as documents

        if toml:
            context.say(documents.to_toml(given).rstrip("\n"))
        elif odcs:
            shown = next((row for row in history if row["active"]), history[0])
            context.document(documents.to_odcs(given, shown["version"]))
        else:
            context.document(documents.to_table_schema(given))
        return
    if as_json:
        context.document({"contract": literal, "versions": history, "files": files})
        return
    plain = contract.literal(given)
    context.facts({word: _fact(plain[word]) for word in plain if word not in ("columns", "table")})
    context.say("")
    context.table(
        ["column", "type", "more"],
        [(c["name"], c["type"], _more(c)) for c in plain["columns"]],
    )
    context.say("")
    context.listing(history, False, "version active columns key_id deployed_at", "")
    context.say("")
    columns = "source rel_path version contract status rows rejects reason"
    context.listing(files, False, columns, "no file has come to it yet\n  try: casparian scan")


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner!r}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _more(column: dict[str, Any]) -> str:
    words = (f"{key} {value!r}" for key, value in column.items() if key not in ("name", "type"))
    return ", ".join(words)


@app.command("set")
def set_(
    ctx: typer.Context,
    name: Name,
    types: Types = None,
    formats: Formats = None,
    decimal: Decimal = None,
    missing: Missing = None,
    key: Key = None,
    encoding: Encoding = None,
    header: Header = None,
    footer: Footer = None,
    control: Control = None,
    sheet: Sheet = None,
    drift: Drift = None,
    max_rejects: MaxRejects = None,
    lines: Lines = False,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The whole new contract; not with the others."),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Also make the table anew: its rows show until the new ones are complete.",
        ),
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Change a table's contract: a new version of it.

    Tries the old and the new contract on the present files, prints which rows would move between
    the rejects and the table, and asks.
    """
    from casparian_flow.services import architect, table_changes, tables
    from casparian_flow.services import table_contracts as contracts

    said = _said(
        types, formats, decimal, missing, key, (), drift=drift, max_rejects=max_rejects,
        lines=lines, encoding=encoding, header=header, footer=footer, control=control,
        sheet=sheet,
    )  # fmt: skip
    if said == contracts.Said() and not from_file and not redo:
        raise typer.BadParameter("say what to change: --type, --format, ..., or --from FILE")
    with context.opened(ctx) as here:
        contracts.check_said(here.settings, here.ledger, name, said)
        table = table_changes.find(here.ledger, name)
        given = _document(from_file, name) if from_file else table.contract
        new = contracts.changed(given, said)
        if new == table.contract and not redo:
            context.note("the contract is the same already; nothing was changed")
            return
        if redo and new == table.contract:
            table_changes.check_redo(here.ledger, name)
        with _workshop(here, table_changes.lock_of(table)) as workshop:
            rows = tables.matching(here.ledger, new.files, new.source)
            change, subject = table_changes.try_change(workshop, table, new, rows)
        _print_change(change, name, redo=redo)
        if new != table.contract:
            version = architect.next_version(here.ledger, name)
            _publish(here, subject, version, dry_run=dry_run, yes=yes)
        elif not dry_run and not _agreed(f"make table {name} anew, from all its files?", yes):
            context.note("nothing was changed")
            raise typer.Exit(ExitCode.FAILED)
        if redo and not dry_run:
            _redo(here, name)


def _print_change(change: Change, name: str, *, redo: bool) -> None:
    for words in change.words:
        context.say(words)
    _print_outcome(change.after)
    rows = counted(change.to_table, "record")
    back = counted(change.to_rejects, "record")
    context.say(f"{rows} would move from the rejects to the table, {back} to the rejects")
    for words in change.shown:
        context.say(f"  {words}")
    if not redo:
        context.say(
            "only files that come from now on are judged by it; --redo makes the table anew"
        )
    if change.retyped and not redo:
        context.say(
            f"columns change their type, which sinks refuse in a table that has rows: --redo, or "
            f"later: casparian rebuild {name}"
        )


def _redo(here: Here, name: str) -> None:
    from casparian_flow.services import table_changes

    done = table_changes.redo(here.ledger, name)
    _print_redone(done)
    if done.rest.queued:
        context.say(f"{counted(done.rest.queued, 'job')} queued for files that gave no rows yet")


def _print_redone(done: Redone) -> None:
    from casparian_flow.cli import rebuild

    for each in done.cancelled:
        context.say(f"{each.words}; it is cancelled, for the contract is another now")
    for started in done.rebuilt:
        rebuild.report(started)
    for sentence in done.notes:
        context.note(f"note: {sentence}")


@app.command()
def accept(
    ctx: typer.Context,
    name: Name,
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="VERSION|PATH", help="Only this held version or file; default: all of them."
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Agree to the other columns of held files.

    New columns are added to the contract with the type that the held files speak for, and columns
    that they lack may be missing from now on. It is a new version of the table, and the held files
    are queued for it. An open rebuild with the contract before begins again with the new one.
    """
    from casparian_flow.errors import CasparianError
    from casparian_flow.services import architect, table_changes

    with context.opened(ctx) as here:
        table = table_changes.find(here.ledger, name)
        rows = table_changes.held(here.ledger, name, which)
        with _workshop(here, table_changes.lock_of(table)) as workshop:
            new = table_changes.accepted(workshop, table, rows)
            subject = workshop.subject_of(new)
            outcome = workshop.try_out(subject, rows)
        context.say(f"{counted(len(rows), 'version')} held")
        for words in table_changes.differences(table.contract, new):
            context.say(words)
        _print_outcome(outcome)
        if not outcome.good:
            raise CasparianError(
                f"none of them would be taken by table {name}: nothing was changed",
                f"mend the file; or casparian table show {name} --toml > FILE, change it, and "
                f"casparian table set {name} --from FILE",
            )
        if new != table.contract:
            version = architect.next_version(here.ledger, name)
            _publish(here, subject, version, dry_run=dry_run, yes=yes)
        if dry_run:
            return
        done = table_changes.accept(here.ledger, name, rows)
    _print_redone(done)
    rest = done.rest
    if rest.queued or not done.rebuilt:
        context.say(f"{counted(rest.queued, 'held job')} queued for {name} {rest.version}")
    if rest.bytes_gone:
        context.note(f"{counted(rest.bytes_gone, 'version')} left out: the content is gone")


@app.command()
def diff(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Compare a table's contract with what its present files say.

    Reads every byte of them. Exits with 1 if columns or types differ, or a file would not be taken.
    """
    from casparian_flow.services import table_changes

    with context.opened(ctx) as here:
        table = table_changes.find(here.ledger, name)
        with _workshop(here, table_changes.lock_of(table)) as workshop:
            found = table_changes.diff(workshop, here.ledger, table)
    if as_json:
        total = found.outcome.total._asdict()
        files = {each.file: each.held or each.error for each in found.outcome.not_taken}
        context.document({"columns": found.columns, "balance": total, "not_taken": files})
    else:
        for row in found.columns:
            row["differs"] = "" if row["contract"] == row["files"] else "!"
        context.listing(found.columns, False, "differs column contract files why", "")
        _print_outcome(found.outcome)
    raise typer.Exit(ExitCode.FAILED if found.differs else ExitCode.DONE)


@app.command()
def remove(
    ctx: typer.Context,
    name: Name,
    reason: Annotated[
        str, typer.Option(metavar="WORDS", help="The reason; it is signed and kept in the audit.")
    ] = "the table was removed",
) -> None:
    """Stop a table: it takes no more files. Its rows stay.

    `casparian retract` hides a file's rows, and `casparian plugins activate` starts the table
    again.
    """
    from casparian_flow import config
    from casparian_flow.db import plugins
    from casparian_flow.services import architect, outputs, table_changes

    with context.opened(ctx) as (_, ledger):
        table_changes.contract_of(ledger, name)
        context.say(plugins.disable(ledger, config.keys_folder(), name, None, reason))
        for sentence in outputs.tell(ledger):
            context.note(f"note: {sentence}")
        if queued := architect.queue_missing(ledger):
            context.say(f"{counted(queued, 'job')} queued for plugins that take any such file")
    context.say("its rows stay; casparian retract PATH hides those of a file")
