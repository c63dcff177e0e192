"""The listener, and the conversation with each connection: a thread each.

    with Server() as server:
        mssql_python.connect(server.connection_string)

What it does not understand it answers with an error and remembers: `Server.check` raises it, so
that a statement nobody foresaw fails the test that sent it, however its sender took the error.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import traceback
from types import TracebackType

from proofs.tds import requests, tokens
from proofs.tds.faults import Entry, Faults, Log
from proofs.tds.packets import Kind, Line, Request, Severed
from proofs.tds.session import PASSWORD, USER, Session
from proofs.tds.tables import Database, SqlError

REPLY_BYTES = 4 << 20
"""What a line takes of a reply before its other end reads."""


class Server:
    """A double of SQL Server on a port of its own.

    Args:
        database: what it serves; a new one where none is given.
        faults: what is to go wrong.
    """

    def __init__(self, database: Database | None = None, faults: Faults | None = None) -> None:
        self.database = database or Database()
        self.faults = faults or Faults()
        self.log = Log()
        self.surprises: list[str] = []
        """What came that it does not understand."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._lines: list[Line] = []
        self._listener = threading.Thread(target=self._listen, name="tds listener")

    @property
    def connection_string(self) -> str:
        """For the driver, with the password."""
        quoted = PASSWORD.replace("}", "}}")
        return (
            f"Server=127.0.0.1,{self.port};Database=tables;UID={USER};PWD={{{quoted}}};Encrypt=no;"
        )

    def __enter__(self) -> Server:
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._listener.join()
        self._socket.close()
        for line in self._lines:
            line.close()
        for thread in self._threads:
            thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Return if everything that came was understood.

        Raises:
            AssertionError: something was not.
        """
        assert not self.surprises, "\n".join(self.surprises)

    def settle(self) -> None:
        """Wait until the connections that were left are at their end."""
        for thread in self._threads:
            thread.join()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._socket.accept()
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPLY_BYTES)
                number = len(self._lines) + 1
                line = Line(peer, self.faults.cut(number))
                self._lines.append(line)
                conversation = _Conversation(self, line, number)
                thread = threading.Thread(target=conversation.run, name=f"tds {number}")
                self._threads.append(thread)
                thread.start()


class _Conversation:
    """All that one connection says, and the answers."""

    def __init__(self, server: Server, line: Line, number: int) -> None:
        self._server = server
        self._line = line
        self._number = number
        self._session = Session(server.database, server.faults)

    def run(self) -> None:
        """Serve until the line is gone; what was not committed is then rolled back."""
        try:
            while True:
                self._serve()
        except Severed:
            if not self._line.whole and self._line.received:
                self._server.log.add(self._entry(self._line.kind, "cut"))
        finally:
            self._session.end()
            self._line.close()

    def _entry(self, kind: Kind, outcome: str) -> Entry:
        return Entry(self._number, self._line.message, kind, outcome, self._line.received)

    def _serve(self) -> None:
        request = self._line.receive()
        entry = self._entry(request.kind, "done")
        self._server.log.add(entry)
        fatal = False
        try:
            if request.reset:
                self._session.end()
            reply = self._reply(request, entry)
        except SqlError as error:
            entry.outcome = f"error {error.number}"
            fatal = error.severity >= 20 or request.kind is Kind.LOGIN
            reply = self._failure(error)
        except Exception as error:
            entry.outcome = "not understood"
            told = "".join(traceback.format_exception(error))
            self._server.surprises.append(f"{entry.said}: {told}")
            reply = self._failure(SqlError(102, f"the double does not understand: {error}"))
        try:
            self._line.send((tokens.was_reset() if request.reset else b"") + reply)
        finally:
            entry.sent = self._line.sent
        if fatal:
            self._line.sever()

    def _reply(self, request: Request, entry: Entry) -> bytes:
        match request.kind:
            case Kind.PRELOGIN:
                return tokens.prelogin()
            case Kind.LOGIN:
                self._session.log_in(requests.read_login(request.body), entry)
                return tokens.logged_in("tables")
            case Kind.BATCH:
                text = requests.read_batch(request.body)
                return tokens.replied(self._session.run(text, {}, entry))
            case Kind.RPC:
                calls = requests.read_calls(request.body)
                return b"".join(
                    self._session.call(call, entry, last=call is calls[-1]) for call in calls
                )
            case Kind.TRANSACTION:
                return tokens.replied(self._session.turn(requests.read_verb(request.body), entry))
            case Kind.BULK:
                return tokens.replied(self._session.load(requests.read_bulk(request.body), entry))
            case _:  # an attention: it comes when its request is answered already
                return tokens.done(status=tokens.ATTENTION)

    def _failure(self, error: SqlError) -> bytes:
        said = tokens.error(error.number, error.state, error.severity, error.words)
        return said + self._session.after(error) + tokens.done(status=tokens.ERROR)
