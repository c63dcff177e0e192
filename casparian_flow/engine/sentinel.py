"""The Sentinel: gives claimed jobs to workers that ask, and their receipts to the Committer.

ZeroMQ is a doorbell here and the ledger is the truth: any message may be lost, and a slow poll
finds what a lost one would have told. Each heartbeat of a worker is answered with what it holds in
our eyes, so that both soon agree again. Peers speak only after `engine.wire` has let their
connection through; they are known by the ROUTER's identity together with that connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import zmq
import zmq.asyncio

from casparian_flow import protocol
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.engine import dispatch, endings, wire
from casparian_flow.engine.committer import Committer
from casparian_flow.engine.dispatch import Dispatcher, artifact
from casparian_flow.engine.wire import Handshake, Refusal, Refusals
from casparian_flow.errors import CasparianError, ExitCode, LedgerError, ProtocolError
from casparian_flow.protocol import AnyMessage, Conclude, Receipt, Reply

log = logging.getLogger(__name__)


INPROC = "inproc://sentinel"

POLL_SECONDS = 1.0
"""The net under the doorbell: how long a job can wait after a lost message."""

LEASE_SECONDS = 30.0
"""A worker in another process that is silent this long loses its jobs. Counted here, on a clock
that nobody sets; the worker has ended them by itself after two thirds of it."""

_PARTS_LIMIT = 8


class Sentinel:
    """One ROUTER socket, and what is known of the peers behind it.

    Args:
        context: the process's zmq context; whoever made it closes the Sentinel before it.
        settings: limits and places.
        ledger: the truth.
        epoch: this daemon run.
        committer: takes the receipts.
        bell: set by whoever made a job claimable.
        deploy: publishes a plugin; called for a client's Deploy.
        ring: called when a client asks for a scan.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        settings: Settings,
        ledger: Ledger,
        epoch: int,
        committer: Committer,
        bell: asyncio.Event,
        *,
        deploy: Callable[[protocol.Deploy], Awaitable[str]],
        ring: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._committer = committer
        self._dispatcher = Dispatcher(settings, epoch)
        self._deploy = deploy
        self._ring = ring
        self._peers: dict[bytes, Peer] = {}
        self._bell = bell
        self._answers: set[asyncio.Task[None]] = set()
        self._draining = False
        self._claiming = asyncio.Lock()
        self._empty = asyncio.Event()
        self._rung = asyncio.Event()
        self.refused = Refusals()
        """Connections and messages that were not ours, by kind."""
        self._socket = context.socket(zmq.ROUTER)
        self._handshake = Handshake(context, self.refused)
        self._keys: list[str] = []
        """Endpoints whose key we have left."""

    @property
    def workers(self) -> int:
        """Workers that are here now."""
        return len(self._peers)

    def bind(self, endpoints: Sequence[str] = ()) -> None:
        """Open the socket, for this process, for clients of this machine and at TCP endpoints.

        Raises:
            ConfigError: an endpoint is not on the loopback interface, or the folder of sockets
                and keys is not ours alone.
            CasparianError: an address cannot be used; the message says why.
        """
        wire.require_zmq()
        hint = '[listen] endpoint = "tcp://127.0.0.1:5555" in the configuration'
        remote = [wire.loopback(endpoint, hint) for endpoint in endpoints]
        local = self._settings.database.control_endpoint
        wire.private_folder()
        wire.tune(self._socket)
        self._socket.router_mandatory = True
        self._handshake.guard(self._socket)
        for endpoint in remote:
            self._open(endpoint)
        # Not before: where another Sentinel has the port, its key stays. The local socket comes
        # last: whoever finds it finds its key, and the daemon lock says that nobody else has it.
        for endpoint in (*remote, local):
            wire.leave_key(endpoint, self._handshake.key)
            self._keys.append(endpoint)
        self._open(local)
        self._open(INPROC)

    def _open(self, endpoint: str) -> None:
        self._socket.ipv6 = "[" in endpoint
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise CasparianError(
                f"cannot listen on {endpoint}: {error.strerror}",
                "another program may use that address; see [listen] in the configuration",
            ) from error

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._handshake.run())
            group.create_task(self._listen())
            group.create_task(self._dispatch())
            group.create_task(self._reap())
            group.create_task(self._revoke())

    async def drain(self, grace_seconds: float) -> None:
        """Claim no more; have every worker finish or release what it holds, and leave."""
        self._draining = True
        async with self._claiming:
            pass  # what is being claimed is assigned first, and then given back
        for identity in list(self._peers):
            await self._send(identity, protocol.Drain(grace_seconds=grace_seconds))
        if self._peers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds + 5.0):
                    await self._empty.wait()
        for identity in list(self._peers):
            await self._lose(identity, "did not leave in time")

    def close(self) -> None:
        """Let go of the socket; after `run` was cancelled."""
        self._socket.close()
        self._handshake.close()
        for endpoint in self._keys:
            wire.key_file(endpoint).unlink(missing_ok=True)

    async def _listen(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart(copy=False)
            connection = self._handshake.heard(frames[-1])
            message = self._read(identity.bytes, connection, frames)
            if message is None:
                continue
            try:
                await self._hear(identity.bytes, connection, message)
            except LedgerError as error:
                log.error("a %s was not answered: %s", type(message).__name__, error.message)

    def _read(self, identity: bytes, connection: str, frames: list[zmq.Frame]) -> AnyMessage | None:
        """The message in these frames; None where it was refused."""
        peer = self._peers.get(identity)
        if not _is_generated(identity) or (peer and peer.connection != connection):
            self.refused.refuse(Refusal.IDENTITY, f"a message under routing id {identity!r}")
        elif len(frames) > _PARTS_LIMIT:
            self.refused.refuse(Refusal.PARTS, f"a message of {len(frames)} parts")
        else:
            try:
                return protocol.decode([frame.bytes for frame in frames])
            except ProtocolError as error:
                self.refused.refuse(Refusal.MALFORMED, error.message)
        return None

    async def _hear(self, identity: bytes, connection: str, message: AnyMessage) -> None:
        match message:
            case protocol.Deploy():
                task = asyncio.create_task(self._answer_deploy(identity, message))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
                return
            case protocol.Ring(scan=scan):
                self._bell.set()
                self._rung.set()
                if scan:
                    self._ring()
                await self._send(identity, protocol.Reply(ok=True, text="rung"))
                return
            case protocol.Ask():
                counts = msgspec.json.encode(self.refused).decode()
                await self._send(identity, protocol.Reply(ok=True, text=counts))
                return
            case protocol.Hello(worker=name):
                await self._admit(identity, Peer(name, connection))
                return
        peer = self._peers.get(identity)
        if peer is None:
            kind = type(message).__name__
            self.refused.refuse(Refusal.UNADMITTED, f"a {kind} of a peer that has not said Hello")
            await self._send(identity, protocol.Unknown())
            return
        peer.seen = time.monotonic()
        match message:
            case protocol.Ready(free=free):
                peer.free = free
                self._bell.set()
            case protocol.Fetch(plugin_id=plugin_id):
                checked = partial(artifact, plugin_id=plugin_id)
                await self._send(identity, await self._ledger.read_soon(checked))
            case Conclude(receipts=receipts):
                for receipt in receipts:
                    peer.concluded(receipt)
                    self._committer.accept(peer.name, receipt)
            case protocol.Heartbeat(sent=sent):
                await self._tell(identity, peer, sent)
            case protocol.Goodbye():
                await self._lose(identity, "left")

    async def _admit(self, identity: bytes, peer: Peer) -> None:
        if identity in self._peers:
            await self._welcome(identity, peer)  # it says Hello again: it may not have heard us
            return
        for other, known in list(self._peers.items()):
            if known.name == peer.name:  # it is back, by another connection
                peer.held = self._peers.pop(other).held
        self._peers[identity] = peer
        self._empty.clear()
        log.info("worker %s is here", peer.name)
        await self._welcome(identity, peer)
        if self._draining:  # it comes while we leave; nobody else would tell it
            await self._send(identity, protocol.Drain(grace_seconds=0.0))

    async def _welcome(self, identity: bytes, peer: Peer) -> None:
        database = self._settings.database
        await self._send(
            identity,
            protocol.Welcome(
                guests_folder=str(database.guests_folder),
                inode=os.stat(database.state_folder).st_ino,
                database=str(database.path),
                guests=self._settings.workers.guests,
                limits=self._settings.guest,
                lease_seconds=LEASE_SECONDS if peer.connection else 0.0,
            ),
        )

    async def _dispatch(self) -> None:
        """Claim for whoever has room; sleep until the bell rings or the poll is due."""
        while True:
            self._bell.clear()
            try:
                for identity, peer in list(self._peers.items()):
                    async with self._claiming:
                        if peer.free and not self._draining and identity in self._peers:
                            await self._assign(identity, peer)
            except LedgerError as error:
                log.error("no jobs are claimed: %s", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._bell.wait()

    async def _assign(self, identity: bytes, peer: Peer) -> None:
        claim = partial(
            self._dispatcher.claim, worker=peer.name, limit=peer.free, sick=self._committer.sick
        )
        # A look costs no transaction; a claim does, and most looks find nothing.
        ready = await self._ledger.read_soon(jobs.claimable)
        assignments = await self._ledger.write_soon(claim) if ready else []
        if not assignments:
            return
        crashpoint("sentinel.claimed")
        peer.free = 0
        peer.held.update((job.job_id, job.fence) for job in assignments)
        await self._send(identity, protocol.Assign(jobs=assignments))
        crashpoint("sentinel.assigned")

    async def _answer_deploy(self, identity: bytes, message: protocol.Deploy) -> None:
        reply = await answered(self._deploy(message))
        self._bell.set()
        await self._send(identity, reply)

    async def _tell(self, identity: bytes, peer: Peer, sent: float = 0.0) -> None:
        await self._send(identity, protocol.Granted(jobs=list(peer.held.items()), sent=sent))

    async def _revoke(self) -> None:
        """Take from the workers what runs no more by the ledger's word: somebody aborted it."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._rung.wait()
            self._rung.clear()
            held = {pair for peer in self._peers.values() for pair in peer.held.items()}
            if not held:
                continue
            try:
                rows = await self._ledger.read_soon(partial(jobs.running, attempts=held))
            except LedgerError as error:
                log.error("whether a job was aborted is not known: %s", error.message)
                continue
            over = held - {(row.id, row.fence) for row in rows}
            for identity, peer in list(self._peers.items()):
                if taken := over & peer.held.items():
                    log.info("worker %s ends %d jobs that run no more", peer.name, len(taken))
                    for job_id, _ in taken:
                        del peer.held[job_id]
                    await self._tell(identity, peer)

    async def _reap(self) -> None:
        """Take their jobs from workers of other processes that fell silent."""
        while True:
            due = time.monotonic() + LEASE_SECONDS / 3
            await asyncio.sleep(LEASE_SECONDS / 3)
            # While we were stopped or too busy we heard nobody: that is not their silence.
            late = time.monotonic() - due
            for peer in self._peers.values():
                peer.seen += late
            horizon = time.monotonic() - LEASE_SECONDS
            silent = [i for i, p in self._peers.items() if p.connection and p.seen < horizon]
            for identity in silent:
                try:
                    await self._lose(identity, f"was silent for {LEASE_SECONDS:g} s", silent=True)
                except LedgerError as error:
                    log.error("the jobs of a lost worker wait: %s", error.message)

    async def _lose(self, identity: bytes, why: str, *, silent: bool = False) -> None:
        """Forget a worker and put what it still holds back into the queue.

        Args:
            silent: it did not say so: one of its jobs may have killed it.
        """
        # What is being claimed for it is known then. No more is until it is forgotten, though it
        # should wake up and be ready for more while its jobs are taken back.
        async with self._claiming:
            peer = self._peers.get(identity)
            if peer is None:
                return
            peer.free = 0
            if peer.held:
                await self._take_back(peer, f"worker {peer.name} {why}", silent)
            self._peers.pop(identity, None)
        if not self._peers:
            self._empty.set()
        self._bell.set()

    async def _take_back(self, peer: Peer, why: str, silent: bool) -> None:
        held = list(peer.held.items())
        log.warning("%s; %d jobs go back to the queue", why, len(held))
        work = partial(dispatch.release, pairs=held, why=why)
        folder = self._settings.database.guests_folder
        if silent:
            hands = endings.read_held(folder)
            work = partial(
                dispatch.lose, pairs=held, hands=hands, limits=self._settings.jobs, why=why
            )
        await self._ledger.write_soon(work)
        crashpoint("sentinel.jobs_taken_back")
        endings.forget(folder, held)

    async def _send(self, identity: bytes, message: AnyMessage) -> None:
        try:
            # Whoever does not read must not make the others wait: the message is lost instead.
            frames = [identity, *protocol.encode(message)]
            await self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("a peer is gone, or does not read: %s", error)


def _is_generated(identity: bytes) -> bool:
    """Whether libzmq gave the peer its routing id: nobody of ours brings one."""
    return len(identity) == 5 and identity[0] == 0


# What the Sentinel knows of one Worker.


@dataclass
class Peer:
    """A worker that said Hello."""

    name: str
    connection: str
    """The User-Id of the connection it came by; empty for one of our own process."""
    free: int = 0
    seen: float = field(default_factory=time.monotonic)
    held: dict[int, int] = field(default_factory=dict)
    """Job id -> fence of what it runs."""

    def concluded(self, receipt: Receipt) -> None:
        """It runs this attempt no more; it may run a later one of the same job."""
        if self.held.get(receipt.job_id) == receipt.fence:
            del self.held[receipt.job_id]


# What the Sentinel answers to a command of another process whose work it did, or could not do.


async def answered(work: Awaitable[str]) -> Reply:
    """The outcome of some work in words, whatever it is: who asked waits for it."""
    try:
        return Reply(ok=True, text=await work)
    except CasparianError as error:
        return Reply(ok=False, text=error.message, hint=error.hint, exit_code=error.exit_code)
    except Exception as error:
        log.exception("a command's work failed in a way we did not expect")
        return Reply(
            ok=False,
            text=f"the daemon failed in a way we did not expect: {type(error).__name__}: {error}",
            hint="its log has the traceback; report what it says",
            exit_code=ExitCode.BUG,
        )
