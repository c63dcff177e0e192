"""What one connection of the driver has on the server: a login, a transaction, its statements."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from proofs.tds import tokens
from proofs.tds.faults import Entry, Faults, Said
from proofs.tds.queries import Batch
from proofs.tds.requests import Bulk, Call, Login, Verb
from proofs.tds.statements import InsertBulk, read
from proofs.tds.tables import Database, SqlError, Transaction
from proofs.tds.tokens import Answer
from proofs.tds.values import INT

USER, PASSWORD = "casparian", "geheim {}; =Wörd"
"""Who may log in."""

_NOTHING: Mapping[str, Any] = {}

_NO_OPTIONS = {"xact_abort": "off", "nocount": "off", "lock_timeout": "0"}

ENDS_TRANSACTION = {1205, 3930}
"""Errors that roll back whatever the session's options are."""


class Session:
    """One connection's state.

    Args:
        database: what it works on.
        faults: what is to go wrong.
    """

    def __init__(self, database: Database, faults: Faults) -> None:
        self._database = database
        self._faults = faults
        self._handles = itertools.count(1)
        self._reset()

    def end(self) -> None:
        """Roll back what is not committed, let go what is held, and be as new."""
        for transaction in filter(None, (self._transaction, self._session)):
            self._database.roll_back(transaction)
        self._reset()

    def _reset(self) -> None:
        self._transaction: Transaction | None = None
        self._session = self._database.begin()
        self._options = _NO_OPTIONS
        self._prepared: dict[int, tuple[str, str | None]] = {}
        self._awaited: InsertBulk | None = None

    def log_in(self, login: Login, entry: Entry) -> None:
        """Let a user in.

        Raises:
            SqlError: 18456.
        """
        self._note(entry, "login", login.user).rows = 0
        if (login.user, login.password) != (USER, PASSWORD):
            raise SqlError(18456, f"Login failed for user '{login.user}'.", severity=14)

    def turn(self, verb: Verb, entry: Entry) -> list[Answer]:
        """Begin or end a transaction."""
        said = self._note(entry, verb.name.lower(), "")
        answer = self._begin() if verb is Verb.BEGIN else self._end(committed=verb is Verb.COMMIT)
        said.rows = 0
        return [answer]

    def run(self, text: str, variables: Mapping[str, Any], entry: Entry) -> list[Answer]:
        """Execute the statements of a batch, until one fails."""
        batch = self._batch(self._session, variables)
        answers: list[Answer] = []
        for statement in read(text):
            said = self._note(entry, statement.name, statement.text, batch.variables)
            if isinstance(statement, InsertBulk):
                self._awaited, said.rows = statement, 0
                answers.append(Answer())
                continue
            if statement.name.startswith("set "):
                _, option, value = statement.name.split()
                self._options = {**self._options, option: value}
            with self._changing() as batch.transaction:
                answered = statement.run(batch)
            said.rows = answered[-1].rows
            answers += answered
        return answers

    def load(self, bulk: Bulk, entry: Entry) -> list[Answer]:
        """Take the rows of a bulk load; all of them or none."""
        assert self._awaited is not None, "rows of a bulk load that was not announced"
        said = self._note(entry, "bulk rows", self._awaited.table)
        with self._changing() as transaction:
            self._awaited.load(self._batch(transaction, {}), bulk)
        said.rows = len(bulk.rows)
        return [tokens.counted(tokens.BULK, len(bulk.rows))]

    def call(self, call: Call, entry: Entry, *, last: bool) -> bytes:
        """Execute a procedure call; its whole answer."""
        options = self._options
        answers, handle = self._called(call, entry)
        self._options = options  # what a procedure sets ends with it
        body = tokens.replied(answers, within=True) + tokens.return_status(0)
        if handle:
            body += tokens.return_value(0, "", INT, handle)
        return body + tokens.done(tokens.DONE_PROCEDURE, 0 if last else tokens.MORE)

    def after(self, error: SqlError) -> bytes:
        """What the server says of the transaction after an error."""
        self._awaited = None
        aborts = self._options["xact_abort"] == "on"
        if self._transaction and (aborts or error.number in ENDS_TRANSACTION):
            return self._end(committed=False).body
        return b""

    def _called(self, call: Call, entry: Entry) -> tuple[list[Answer], int]:
        """The answers of its statements, and the handle of what it prepared."""
        values = [parameter.value for parameter in call.parameters]
        match call.procedure:
            case "sp_executesql":
                text, declared = values[0], values[1] if len(values) > 1 else ""
                return self.run(text, _named(declared, values[2:]), entry), 0
            case "sp_prepexec":
                handle = self._prepare(values[2], values[1])
                return self.run(values[2], _named(values[1], values[3:]), entry), handle
            case "sp_prepare":
                self._note(entry, "prepare", values[2])
                return [], self._prepare(values[2], values[1])
            case "sp_execute":
                text, declared = self._prepared[values[0]]
                return self.run(text, _named(declared, values[1:]), entry), 0
            case "sp_unprepare":
                self._note(entry, "unprepare", "")
                del self._prepared[values[0]]
                return [], 0
            case procedure:
                raise ValueError(f"procedure {procedure} with {values}")

    def _batch(self, transaction: Transaction, variables: Mapping[str, Any]) -> Batch:
        return Batch(self._database, transaction, dict(variables))

    def _prepare(self, text: str, declared: str | None) -> int:
        handle = next(self._handles)
        self._prepared[handle] = (text, declared)
        return handle

    def _note(
        self, entry: Entry, name: str, text: str, values: Mapping[str, Any] = _NOTHING
    ) -> Said:
        """Write down what is about to be done, unless the plan has an error for it."""
        said = Said(name, text, dict(values))
        entry.said.append(said)
        self._faults.refuse(said)
        return said

    def _begin(self) -> Answer:
        assert self._transaction is None, "a transaction within another"
        self._transaction = self._database.begin()
        return Answer(tokens.began(self._transaction.number))

    def _end(self, *, committed: bool) -> Answer:
        if self._transaction is None:
            verb = "COMMIT" if committed else "ROLLBACK"
            raise SqlError(3902 if committed else 3903, f"{verb} has no BEGIN TRANSACTION.")
        transaction, self._transaction = self._transaction, None
        (self._database.commit if committed else self._database.roll_back)(transaction)
        return Answer(tokens.ended(transaction.number, committed=committed))

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Transaction]:
        """The connection's transaction, or one for this statement alone."""
        if self._transaction:
            yield self._transaction
            return
        transaction = self._database.begin()
        try:
            yield transaction
            self._database.commit(transaction)
        finally:
            self._database.roll_back(transaction)


def _named(declared: str | None, values: list[Any]) -> dict[str, Any]:
    """The variables that a declaration such as `@P1 int,@P2 nvarchar(5)` gives these values."""
    names = re.findall(r"@\w+", declared or "")
    return dict(zip(names, values, strict=True))
