"""The composition root: the parts of a daemon, and the order in which they start and stop.

    start   daemon lock, ledger, inventory, epoch, recovery, Committer, Sentinel, Workers, Scout
    stop    Scout (no new work), Workers (finish or release), Sentinel, Committer, ledger, lock

`python -m casparian_flow.main` runs a daemon without Workers, for Workers in other processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import zmq.asyncio

from casparian_flow import config, durable, trees
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import integrity, outputs, plugins
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.engine import canary, contents, dispatch, endings, sinks
from casparian_flow.engine.committer import Committer
from casparian_flow.engine.dispatch import ledger_tag
from casparian_flow.engine.sentinel import INPROC, Sentinel
from casparian_flow.engine.worker_client import Worker
from casparian_flow.errors import CasparianError, ExitCode, LedgerLost, leave
from casparian_flow.security import sandbox
from casparian_flow.services import architect, inventory, store_upkeep, trial
from casparian_flow.services.scout import Scrubber
from casparian_flow.services.watch import Watch

log = logging.getLogger(__name__)

ECHO_SECONDS = 1.0
"""A second signal within this time is ignored: `timeout` and some shells signal the process and its
group."""

GUARD_SECONDS = 2.0
"""How often an idle daemon checks whether its database was deleted or replaced."""


@dataclass
class Daemon:
    """The parts of a running daemon that its caller may use."""

    ledger: Ledger
    sentinel: Sentinel
    watch: Watch | None
    adopted: Sequence[str] = ()
    """Outputs that the start found in sinks and added to the ledger, a sentence for each sink."""


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    role: str,
    *,
    workers: int,
    watch: bool,
    endpoints: Sequence[str] = (),
) -> AsyncIterator[Daemon]:
    """Be the daemon of this database while the block runs; leaving it drains and stops.

    Args:
        role: our command line, for the message that another daemon gets.
        workers: number of Workers in this process.
        watch: scan and watch the source roots.
        endpoints: TCP addresses to listen on for Workers in other processes.

    Raises:
        DaemonRunning: another process is the daemon.
        SandboxUnavailable: the sandbox is required, and can be broken on this machine.
        LedgerError: the database cannot be used, or a write failed for good.
        LedgerLost: the database is damaged, or was deleted or replaced while the block ran.
        CasparianError: an address cannot be listened on.
    """
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(open_ledger(settings.database))
        stack.enter_context(durable.hold_daemon_lock(settings.database.daemon_lock, role))
        crashpoint("main.locked")
        sandbox.shield_host()
        if workers:
            await asyncio.to_thread(canary.check, settings.guest, config.cache_folder())
        epoch, adopted = await _begin(settings, ledger)
        context = stack.enter_context(zmq.asyncio.Context())
        claimable = asyncio.Event()
        committer = Committer(
            ledger, epoch, settings.jobs, on_change=claimable.set,
            keep_days=settings.output.keep_replaced_days,
        )  # fmt: skip
        scout = Watch(ledger, settings.scan, on_jobs=claimable.set, on_change=committer.look)
        scrubber = Scrubber(ledger, settings.scan, on_jobs=claimable.set)
        sentinel = Sentinel(
            context, settings, ledger, epoch, committer, claimable, request_scan=scout.ring,
            deploy=lambda plugin: asyncio.to_thread(architect.deploy, ledger, settings, plugin),
        )  # fmt: skip
        stack.callback(sentinel.close)
        sentinel.bind(endpoints)  # before the sweep: clients that see the lock can connect
        await asyncio.to_thread(_sweep, settings, ledger)
        async with asyncio.TaskGroup() as group:
            breaking = group.create_task(ledger.until_broken())
            publishing = group.create_task(committer.run())
            serving = group.create_task(sentinel.run())
            working = [group.create_task(w.run()) for w in _workers(workers, context)]
            scouts = (scout, scrubber) if watch else ()
            scouting = [group.create_task(part.run()) for part in scouts]
            scouting.append(group.create_task(_guard(ledger)))
            asking = inventory.keep_asking(settings, ledger, claimable.set)
            scouting.append(group.create_task(asking))
            try:
                yield Daemon(ledger, sentinel, scout if watch else None, adopted)
            finally:
                for task in [breaking, *scouting]:
                    task.cancel()
                grace = _grace(settings, ledger)
                await _stop(sentinel, committer, working, serving, publishing, grace)
                crashpoint("main.stopped")


async def _begin(settings: Settings, ledger: Ledger) -> tuple[int, list[str]]:
    """Check the ledger, complete what the last daemon left unfinished, and start an epoch.

    Returns:
        The epoch, and `Daemon.adopted`.
    """
    if damage := await ledger.read_soon(integrity.damage):
        raise LedgerLost(
            f"the database {settings.database.path} is damaged: {damage}; nothing was changed",
            "restore a backup, then: casparian verify   (docs/disaster.md)",
        )
    adopted = await asyncio.to_thread(inventory.take, settings, ledger)
    guests = settings.database.guests_folder
    ending = await asyncio.to_thread(endings.read_ending, guests)
    begin = partial(dispatch.begin_epoch, limits=settings.jobs, ending=ending, guests_folder=guests)
    epoch = await ledger.write_soon(begin)
    await asyncio.to_thread(endings.begin_ending, guests)
    await asyncio.to_thread(inventory.begin, settings.database, ledger)
    crashpoint("main.begun")
    return epoch, adopted


def _workers(count: int, context: zmq.asyncio.Context) -> list[Worker]:
    cache = config.cache_folder()
    names = (f"{os.getpid()}-{n}" for n in range(1, count + 1))
    return [Worker(name, context, INPROC, cache) for name in names]


async def _stop(
    sentinel: Sentinel,
    committer: Committer,
    working: Sequence[asyncio.Task[None]],
    serving: asyncio.Task[None],
    publishing: asyncio.Task[None],
    grace: float,
) -> None:
    """Drain the Workers, then end the Sentinel and the Committer."""
    if not (serving.done() or serving.cancelling()):  # else no receipt would be read
        await sentinel.drain(grace)
    await asyncio.gather(*working, return_exceptions=True)
    serving.cancel()
    committer.leave()
    await asyncio.gather(serving, publishing, return_exceptions=True)
    await committer.finish()


async def _guard(ledger: Ledger) -> None:
    """Raise LedgerLost when the database is gone, even if there is nothing to write."""
    while True:
        await asyncio.sleep(GUARD_SECONDS)
        ledger.check_place()


def _grace(settings: Settings, ledger: Ledger) -> float:
    """Seconds that jobs may take to finish; 0 if the ledger that would record them is gone."""
    try:
        ledger.check_place()
    except LedgerLost:
        return 0.0
    return settings.jobs.drain_seconds


def _sweep(settings: Settings, ledger: Ledger) -> None:
    """Remove what a dead daemon left: guests' folders, bytes in the store that no row names, and
    stages that were not decided."""
    try:
        store_upkeep.sweep(ledger)
    except contents.FAULTS as error:
        log.warning("the store cannot be swept: %s", contents.words(error))
    trees.clear_away(settings.database.guests_folder)
    trial.sweep(settings.database)
    crashpoint("main.guests_swept")
    needed = ledger.read(outputs.stages)
    tag = ledger_tag(settings.database.path)
    for uri in {settings.output.default_uri, *ledger.read(_topic_uris)}:
        with contextlib.suppress(CasparianError, OSError):
            location = sinks.resolve(uri, settings.home)
            folder = sinks.open_sink(location, settings.database).stage_folder
            for file in folder.glob(f"{tag}-*"):
                if str(file) not in needed:
                    durable.remove(file)
                    crashpoint("main.stage_swept")
            sinks.drop_stages(location, settings.database, tag, needed)


def _topic_uris(connection: Connection) -> set[str]:
    return {row.uri for rows in plugins.topics(connection).values() for row in rows}


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` at the first SIGTERM or SIGINT; exit at once at a second one.

    That is safe: the kernel kills the guests, and the next start takes their jobs back from the
    ledger. Their attempts do not count, and no job is suspected as the cause.
    """
    loop = asyncio.get_running_loop()
    first = 0.0

    def react() -> None:
        nonlocal first
        if not stop.is_set():
            first = loop.time()
            stop.set()
        elif loop.time() - first > ECHO_SECONDS:
            endings.let_go()
            os._exit(ExitCode.INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, react)


async def listen(settings: Settings) -> None:
    """Run a Sentinel for Workers in other processes, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    endpoint = settings.listen.endpoint
    async with running(
        settings, "casparian_flow.main", workers=0, watch=True, endpoints=[endpoint]
    ):
        log.info("waiting for workers at %s", endpoint)
        await stop.wait()
        log.info("stopping: waiting for running jobs to finish")


def main() -> None:
    """Command line of a Sentinel without Workers of its own."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m casparian_flow.main")
    parser.add_argument("--config", help="the configuration file")
    parser.add_argument("--debug", action="store_true", help="log everything")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    try:
        config.arm_crashpoints()
        asyncio.run(listen(config.load(options.config)))
    except (CasparianError, OSError, BaseExceptionGroup) as error:
        leave(error)


if __name__ == "__main__":
    main()
