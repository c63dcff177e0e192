"""The Sentinel: gives claimed jobs to workers that ask, and their receipts to the Committer.

ZeroMQ is a doorbell here and the ledger is the truth: any message may be lost, and a slow poll
finds what a lost one would have told. Peers are known by the ROUTER's identity and speak only
after they have proved that they share our filesystem.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import zmq
import zmq.asyncio

from casparian_flow import atomic, protocol
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.engine.committer import Committer
from casparian_flow.engine.dispatch import Dispatcher, artifact
from casparian_flow.errors import CasparianError, LedgerError, ProtocolError
from casparian_flow.protocol import AnyMessage, Conclude

log = logging.getLogger(__name__)

INPROC = "inproc://sentinel"

POLL_SECONDS = 1.0
"""The net under the doorbell: how long a job can wait after a lost message."""

LEASE_SECONDS = 30.0
"""A worker in another process that is silent this long loses its jobs."""

_PARTS_LIMIT = 8


@dataclass
class Peer:
    """A worker that proved itself."""

    name: str
    remote: bool
    free: int = 0
    seen: float = field(default_factory=time.monotonic)
    held: dict[int, int] = field(default_factory=dict)
    """Job id -> fence of what it runs."""


class Sentinel:
    """One ROUTER socket, and what is known of the peers behind it.

    Args:
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
        self._clients: set[bytes] = set()
        self._bell = bell
        self._answers: set[asyncio.Task[None]] = set()
        self._draining = False
        self._empty = asyncio.Event()
        self._token = secrets.token_hex(32)
        self._token_path = settings.database.token
        self.dropped = 0
        """Messages that were not ours."""

    @property
    def workers(self) -> int:
        """Workers that are here now."""
        return len(self._peers)

    def bind(self, context: zmq.asyncio.Context, endpoints: list[str]) -> None:
        """Open the socket.

        Raises:
            CasparianError: an address cannot be used; the message says why.
        """
        atomic.write_once(self._token_path, self._token.encode(), mode=0o600)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self._socket.maxmsgsize = protocol.FRAME_LIMIT
        self._socket.router_mandatory = True
        for endpoint in endpoints:
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
            group.create_task(self._listen())
            group.create_task(self._dispatch())
            group.create_task(self._reap())

    async def drain(self, grace_seconds: float) -> None:
        """Claim no more; have every worker finish or release what it holds, and leave."""
        self._draining = True
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
        self._token_path.unlink(missing_ok=True)

    async def _listen(self) -> None:
        while True:
            identity, *frames = await self._socket.recv_multipart()
            try:
                if len(frames) > _PARTS_LIMIT:
                    raise ProtocolError(f"a message of {len(frames)} parts")
                message = protocol.decode(frames)
            except ProtocolError as error:
                self.dropped += 1
                log.warning("dropped a message (%d so far): %s", self.dropped, error)
                continue
            try:
                await self._hear(identity, message)
            except LedgerError as error:
                log.error("a %s was not answered: %s", type(message).__name__, error.message)

    async def _hear(self, identity: bytes, message: AnyMessage) -> None:
        match message:
            case protocol.Deploy() if identity in self._clients:
                self._clients.discard(identity)
                self._answers.add(asyncio.create_task(self._answer_deploy(identity, message)))
                return
            case protocol.Ring(scan=scan) if identity in self._clients:
                self._clients.discard(identity)
                self._bell.set()
                if scan:
                    self._ring()
                await self._send(identity, protocol.Reply(ok=True, text="rung"))
                return
            case protocol.Proof():
                await self._admit(identity, message)
                return
        peer = self._peers.get(identity)
        if peer is None:
            await self._send(identity, protocol.Challenge(token_path=str(self._token_path)))
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
                    peer.held.pop(receipt.job_id, None)
                    self._committer.accept(peer.name, receipt)
            case protocol.Goodbye():
                await self._lose(identity, "left")

    async def _admit(self, identity: bytes, proof: protocol.Proof) -> None:
        if not secrets.compare_digest(proof.token.encode(), self._token.encode()):
            reason = (
                f"it cannot read {self._token_path}: a worker must run on this machine, as this "
                "user, with the Sentinel's files in reach"
            )
            log.warning("refused worker %s: %s", proof.worker, reason)
            await self._send(identity, protocol.Refused(reason=reason))
            return
        if not proof.worker:
            self._clients.add(identity)
            return
        if identity in self._peers:
            return
        self._peers[identity] = Peer(proof.worker, remote=proof.pid != os.getpid())
        self._empty.clear()
        await self._send(
            identity,
            protocol.Welcome(
                guests_folder=str(self._settings.database.guests_folder),
                guests=self._settings.workers.guests,
                limits=self._settings.guest,
            ),
        )
        if self._draining:  # it comes while we leave; nobody else would tell it
            await self._send(identity, protocol.Drain(grace_seconds=0.0))

    async def _dispatch(self) -> None:
        """Claim for whoever has room; sleep until the bell rings or the poll is due."""
        while True:
            self._bell.clear()
            try:
                for identity, peer in list(self._peers.items()):
                    if peer.free and not self._draining:
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
        peer.free = 0
        peer.held.update((job.job_id, job.fence) for job in assignments)
        await self._send(identity, protocol.Assign(jobs=assignments))

    async def _answer_deploy(self, identity: bytes, message: protocol.Deploy) -> None:
        try:
            reply = protocol.Reply(ok=True, text=await self._deploy(message))
        except CasparianError as error:
            reply = protocol.Reply(
                ok=False, text=error.message, hint=error.hint, exit_code=error.exit_code
            )
        self._bell.set()
        await self._send(identity, reply)

    async def _reap(self) -> None:
        """Take their jobs from workers of other processes that fell silent."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            horizon = time.monotonic() - LEASE_SECONDS
            silent = [i for i, p in self._peers.items() if p.remote and p.seen < horizon]
            for identity in silent:
                try:
                    # It may be one of its jobs that killed it: the attempts count.
                    await self._lose(identity, f"was silent for {LEASE_SECONDS:g} s", refund=False)
                except LedgerError as error:
                    log.error("the jobs of a lost worker wait: %s", error.message)

    async def _lose(self, identity: bytes, why: str, refund: bool = True) -> None:
        """Forget a worker and put what it still holds back into the queue."""
        peer = self._peers[identity]
        for job_id, fence in peer.held.items():
            log.warning("worker %s %s; job %d goes back to the queue", peer.name, why, job_id)
            await self._ledger.write_soon(
                partial(jobs.requeue, job_id=job_id, fence=fence, reason="", refund=refund)
            )
        del self._peers[identity]
        if not self._peers:
            self._empty.set()
        self._bell.set()

    async def _send(self, identity: bytes, message: AnyMessage) -> None:
        try:
            await self._socket.send_multipart([identity, *protocol.encode(message)])
        except zmq.ZMQError as error:
            log.debug("a peer is gone: %s", error)
