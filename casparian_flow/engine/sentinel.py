"""The Sentinel: claims jobs for Workers, and passes their receipts to the Committer.

Messages only wake; the ledger has the state. Any message may be lost: a slow poll finds what it
would have said. Each heartbeat of a Worker is answered with the jobs that the Sentinel believes it
holds, so that both soon agree again. Only connections that `engine.wire` admitted can send; a peer
is identified by the ROUTER's routing id together with its connection.
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
from casparian_flow.errors import CasparianError, ExitCode, LedgerError, ProtocolError, counted
from casparian_flow.protocol import AnyMessage, Conclude, Receipt, Reply

log = logging.getLogger(__name__)


INPROC = "inproc://sentinel"

POLL_SECONDS = 1.0
"""Longest delay of a job after a lost message."""

LEASE_SECONDS = 30.0
"""A Worker in another process that is silent this long loses its jobs; it ends them itself after
two thirds of it. Measured here, on the monotonic clock."""

_PARTS_LIMIT = 8


class Sentinel:
    """One ROUTER socket and the Workers that are connected to it.

    Args:
        context: the process's zmq context; close the Sentinel before it.
        settings: limits and paths.
        ledger: the ledger.
        epoch: number of this run of the daemon.
        committer: gets the receipts.
        claimable: set when a job may have become claimable.
        deploy: publishes a plugin; called for a client's Deploy.
        request_scan: called when a client asks for a scan.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        settings: Settings,
        ledger: Ledger,
        epoch: int,
        committer: Committer,
        claimable: asyncio.Event,
        *,
        deploy: Callable[[protocol.Deploy], Awaitable[str]],
        request_scan: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._committer = committer
        self._dispatcher = Dispatcher(settings, epoch)
        self._deploy = deploy
        self._request_scan = request_scan
        self._peers: dict[bytes, Peer] = {}
        self._claimable = claimable
        self._answers: set[asyncio.Task[None]] = set()
        self._draining = False
        self._claiming = asyncio.Lock()
        self._empty = asyncio.Event()
        self._changed = asyncio.Event()
        self.refused = Refusals()
        """Refused connections and messages, by kind."""
        self._socket = context.socket(zmq.ROUTER)
        self._handshake = Handshake(context, self.refused)
        self._keys: list[str] = []
        """Endpoints whose key file we wrote."""

    @property
    def workers(self) -> int:
        """Number of connected Workers."""
        return len(self._peers)

    def bind(self, endpoints: Sequence[str] = ()) -> None:
        """Listen in this process, on the local socket for clients, and at TCP endpoints.

        Raises:
            ConfigError: an endpoint is not on the loopback interface, or other users can write to
                the folder of sockets and keys.
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
        # Write key files only after the ports are bound, so that the key of another Sentinel stays.
        # The local socket comes last: a client that finds it also finds its key, and the daemon
        # lock ensures that no other process has it.
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
                "another program may be using that address; see [listen] in the configuration",
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
        """Claim no more jobs, and have every Worker finish or release its jobs and leave."""
        self._draining = True
        async with self._claiming:
            pass  # a claim that is under way is assigned first, and then released
        for identity in list(self._peers):
            await self._send(identity, protocol.Drain(grace_seconds=grace_seconds))
        if self._peers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds + 5.0):
                    await self._empty.wait()
        for identity in list(self._peers):
            await self._lose(identity, "did not leave in time")

    def close(self) -> None:
        """Close the socket, after `run` was cancelled."""
        self._socket.close()
        self._handshake.close()
        self._dispatcher.close()
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
                log.error(
                    "could not answer a %s message: %s", type(message).__name__, error.message
                )

    def _read(self, identity: bytes, connection: str, frames: list[zmq.Frame]) -> AnyMessage | None:
        """Decode the frames; None if the message is refused."""
        peer = self._peers.get(identity)
        if not _is_generated(identity) or (peer and peer.connection != connection):
            self.refused.refuse(Refusal.IDENTITY, f"a message with the routing id {identity!r}")
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
                self._claimable.set()
                self._changed.set()
                self._committer.look()
                if scan:
                    self._request_scan()
                await self._send(identity, protocol.Reply(ok=True, text="rung"))
                return
            case protocol.GetStats():
                counts = msgspec.json.encode(self.refused).decode()
                await self._send(identity, protocol.Reply(ok=True, text=counts))
                return
            case protocol.Hello(worker=name):
                await self._admit(identity, Peer(name, connection))
                return
        peer = self._peers.get(identity)
        if peer is None:
            kind = type(message).__name__
            self.refused.refuse(
                Refusal.UNADMITTED, f"a {kind} message from a peer that sent no Hello before"
            )
            await self._send(identity, protocol.Unknown())
            return
        peer.seen = time.monotonic()
        match message:
            case protocol.Ready(free=free):
                peer.free = free
                self._claimable.set()
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
            await self._welcome(identity, peer)  # a repeated Hello: the Welcome may be lost
            return
        for other, known in list(self._peers.items()):
            if known.name == peer.name:  # it has reconnected
                peer.held = self._peers.pop(other).held
        self._peers[identity] = peer
        self._empty.clear()
        log.info("worker %s connected", peer.name)
        await self._welcome(identity, peer)
        if self._draining:  # `drain` did not know this Worker
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
        """Claim jobs for Workers with room; wait for `claimable`, or for the next poll."""
        while True:
            self._claimable.clear()
            try:
                for identity, peer in list(self._peers.items()):
                    async with self._claiming:
                        if peer.free and not self._draining and identity in self._peers:
                            await self._assign(identity, peer)
            except LedgerError as error:
                log.error("cannot claim jobs: %s", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._claimable.wait()

    async def _assign(self, identity: bytes, peer: Peer) -> None:
        claim = partial(
            self._dispatcher.claim, worker=peer.name, limit=peer.free, paused=self._committer.paused
        )
        # Read first: a claim needs a write transaction, and mostly there is nothing to claim.
        ready = await self._ledger.read_soon(jobs.claimable)
        assignments = await self._ledger.write_soon(claim) if ready else []
        if not assignments:
            return
        assignments = await asyncio.to_thread(self._dispatcher.with_bytes, assignments)
        crashpoint("sentinel.claimed")
        peer.free = 0
        peer.held.update((job.job_id, job.fence) for job in assignments)
        await self._send(identity, protocol.Assign(jobs=assignments))
        crashpoint("sentinel.assigned")

    async def _answer_deploy(self, identity: bytes, message: protocol.Deploy) -> None:
        reply = await reply_to(self._deploy(message))
        self._claimable.set()
        await self._send(identity, reply)

    async def _tell(self, identity: bytes, peer: Peer, sent: float = 0.0) -> None:
        await self._send(identity, protocol.Granted(jobs=list(peer.held.items()), sent=sent))

    async def _revoke(self) -> None:
        """Take attempts from the Workers that the ledger does not have as RUNNING: aborted jobs."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            held = {pair for peer in self._peers.values() for pair in peer.held.items()}
            if not held:
                continue
            try:
                rows = await self._ledger.read_soon(partial(jobs.running, attempts=held))
            except LedgerError as error:
                log.error("cannot read which jobs were aborted: %s", error.message)
                continue
            ended = held - {(row.id, row.fence) for row in rows}
            for identity, peer in list(self._peers.items()):
                if taken := ended & peer.held.items():
                    some = counted(len(taken), "job")
                    log.info("worker %s ends %s that it no longer holds", peer.name, some)
                    for job_id, _ in taken:
                        del peer.held[job_id]
                    await self._tell(identity, peer)

    async def _reap(self) -> None:
        """Take back the jobs of Workers in other processes whose lease has expired."""
        while True:
            due = time.monotonic() + LEASE_SECONDS / 3
            await asyncio.sleep(LEASE_SECONDS / 3)
            # Time in which this process was stopped or too busy does not count as silence.
            late = time.monotonic() - due
            for peer in self._peers.values():
                peer.seen += late
            horizon = time.monotonic() - LEASE_SECONDS
            silent = [i for i, p in self._peers.items() if p.connection and p.seen < horizon]
            for identity in silent:
                try:
                    await self._lose(identity, f"was silent for {LEASE_SECONDS:g} s", silent=True)
                except LedgerError as error:
                    log.error("cannot requeue the jobs of a lost worker yet: %s", error.message)

    async def _lose(self, identity: bytes, why: str, *, silent: bool = False) -> None:
        """Remove a Worker and put its jobs back into the queue.

        Args:
            silent: it sent no Goodbye: one of its jobs may have killed it.
        """
        # With the lock, so that no claim for it is under way, and none begins if it sends Ready
        # while its jobs are taken back.
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
        self._claimable.set()

    async def _take_back(self, peer: Peer, why: str, silent: bool) -> None:
        held = list(peer.held.items())
        log.warning("%s; back in the queue: %s", why, counted(len(held), "job"))
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
            # A peer that does not read must not block the others: drop the message.
            frames = [identity, *protocol.encode(message)]
            await self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("a peer does not receive messages: %s", error)


def _is_generated(identity: bytes) -> bool:
    """Whether libzmq generated the routing id; our peers never set one."""
    return len(identity) == 5 and identity[0] == 0


@dataclass
class Peer:
    """A Worker that sent Hello."""

    name: str
    connection: str
    """The User-Id of its connection; empty for a Worker in this process."""
    free: int = 0
    seen: float = field(default_factory=time.monotonic)
    held: dict[int, int] = field(default_factory=dict)
    """Job id -> fence of the attempts that it holds."""

    def concluded(self, receipt: Receipt) -> None:
        """Remove a concluded attempt; the Worker may hold a later one of the same job."""
        if self.held.get(receipt.job_id) == receipt.fence:
            del self.held[receipt.job_id]


async def reply_to(work: Awaitable[str]) -> Reply:
    """Await `work` and turn its result, or any exception, into a Reply."""
    try:
        return Reply(ok=True, text=await work)
    except CasparianError as error:
        return Reply(ok=False, text=error.message, hint=error.hint, exit_code=error.exit_code)
    except Exception as error:
        log.exception("a command failed unexpectedly")
        return Reply(
            ok=False,
            text=f"the daemon failed unexpectedly: {type(error).__name__}: {error}",
            hint="report the traceback in its log",
            exit_code=ExitCode.BUG,
        )
