"""The Architect: a signed plugin becomes a deployed one, wired to rules, topics and files.

The publisher's side makes a `Deploy`; the ledger's side trusts nothing it says: it reads the
MANIFEST again (by AST, never running the code), rebuilds what must have been signed, checks the
signature over it, and asks the trust log whether the key may publish this plugin.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import msgspec
from packaging.version import Version

from casparian_flow import bundled
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, backfill, plugins, trust, versions, visibility
from casparian_flow.db import outputs as db_outputs
from casparian_flow.db import topics as db_topics
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.backfill import Choice
from casparian_flow.db.routing import Routing
from casparian_flow.db.visibility import Change, Scope
from casparian_flow.engine.locking import check_lock
from casparian_flow.errors import (
    ArtifactRefused,
    AuthError,
    PluginError,
    PublishConflict,
    counted,
)
from casparian_flow.protocol import Deploy, Introduction
from casparian_flow.security import gatekeeper, keys, signing
from casparian_flow.security.choices import NOTHING, Choices, choose
from casparian_flow.security.manifest import Manifest, normal_version, read_manifest
from casparian_flow.security.rules import Policy
from casparian_flow.security.signing import AzureAuth, LocalAuth, Publish, Row, TrustKey
from casparian_flow.security.trust import Key, Trust, introduction
from casparian_flow.services import inventory, outputs, scan, scout, topics
from casparian_flow.services.keys import FIRST
from casparian_flow.services.topics import TopicSink


def next_version(ledger: Ledger, name: str) -> str:
    """The patch release after the newest one deployed; 1.0.0 for a new plugin."""
    known = ledger.read(lambda c: plugins.versions(c, name, stubs=True))
    return _after(known[-1]) if known else "1.0.0"


def read_plugin(
    file: Path, choices: Choices = NOTHING, say: Callable[[str], None] = lambda _: None
) -> tuple[bytes, Manifest]:
    """A plugin file's bytes and its MANIFEST, with what was chosen in the place of the author's.

    Args:
        say: is given each line that a person should read about the choices.

    Raises:
        PluginError: it cannot be read, is not a plugin, or does not have what was chosen; the
            message says what is missing.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        shipped = f"casparian publish {file.stem}   (the bundled plugin)"
        hint = shipped if file.stem in bundled.names() else "check the path"
        raise PluginError(f"cannot read {file}: {error.strerror}", hint) from error
    chosen = choose(source, file.name, choices)
    for note in chosen.notes:
        say(note)
    return chosen.source, read_manifest(chosen.source, file.name)


def sign(
    ledger: Ledger,
    file: Path,
    source: bytes,
    lock: str,
    name: str,
    version: str,
    folder: Path,
    *,
    auth: LocalAuth | AzureAuth = signing.LOCAL,
    token: str = "",
    dry_run: bool = False,
) -> Deploy:
    """Sign a plugin for this ledger, with this person's key, which is made on first use.

    Where the ledger trusts no key yet, this one introduces itself as its first.

    Args:
        folder: where the keys are.
        auth: how the publisher proved who they are.
        token: what they proved it with, where they signed in.
        dry_run: have everything checked, and nothing changed.

    Raises:
        PluginError: the key cannot be used, because others can read it for one.
    """
    key = keys.local_key(folder)
    public_key = key.verify_key.encode()
    trusted = ledger.read(trust.read)
    statement = signing.publishing(trusted.ledger_id, name, version, source, lock, public_key, auth)
    payload, signature = signing.sign(key, statement)
    first = None if trusted.seq else introduction(key, trusted.ledger_id, trust.person())
    return Deploy(
        file_name=file.name,
        source=source,
        lock=lock,
        public_key=public_key,
        signature=signature,
        statement=payload,
        introduction=first and Introduction(payload=first.payload, signature=first.signature),
        token=token,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Candidate:
    """What was sent, and what it was found to be."""

    message: Deploy
    statement: Publish
    manifest: Manifest
    verdict: dict[str, Any]
    """The Gatekeeper's: ruleset, policy and outcome."""
    sinks: list[TopicSink]
    """Where its topics go, unless somebody has placed them."""
    signed_in: dict[str, str]
    """Who signed in to publish it; empty where the key alone says who it is."""


class _Recorded(NamedTuple):
    """What a deployment did."""

    messages: list[str]
    """What was done, then what else there is to say; a sentence each."""
    events: list[Event]


class _Activated(NamedTuple):
    """What became of a version that was made the active one."""

    change: Change
    again: str
    """A clause about jobs that were queued again."""
    words: list[str]
    """A sentence each: what its MANIFEST says of sinks and is not so, since a topic stays where it
    is; that its patterns match more files than before; which rows are in other sinks."""


class _DryRun(Exception):
    """Takes back what the transaction did; carries what it was going to say."""


def deploy(ledger: Ledger, settings: Settings, message: Deploy) -> str:
    """Check and record a plugin, wire it, and queue the files it wants; says what it did.

    Deploying the same bytes again changes nothing and is no error. A dry run is the whole
    transaction, taken back.

    Raises:
        PluginError: it is not what was signed, or is not a plugin.
        PolicyRefused: the Gatekeeper found something in it.
        PublishConflict: the version exists with other bytes.
        AuthError: the signature does not hold, or who signed may not publish this plugin here.
        ConfigError: one of its sinks cannot be opened, or a plugin may not write there.
    """
    candidate = _examine(
        settings, message, ledger.read(trust.ledger_id), ledger.read(versions.active_paths)
    )

    def work(connection: Connection) -> _Recorded:
        done = _record(connection, settings, candidate)
        if message.dry_run:
            raise _DryRun("\n".join(done.messages))
        crashpoint("architect.deployment_written")
        return done

    try:
        deed, *stays = ledger.change(work, lambda done: done.events).messages
    except _DryRun as undone:
        would = textwrap.indent(str(undone), "  ")
        return f"dry run, nothing was changed; without --dry-run it would say:\n{would}"
    crashpoint("architect.deployed")
    inventory.note(settings, ledger)
    stays += outputs.tell(ledger)
    queued = queue_missing(ledger)
    if queued:
        deed += f"; {counted(queued, 'job')} queued for known files"
    older: Iterator[str] = iter(())
    if not candidate.manifest.is_table:  # `table set` says what it moves, and offers to redo it
        older = _older_work(ledger, candidate.manifest.name, candidate.statement.version)
    return "\n".join([deed, *stays, *older])


def _older_work(ledger: Ledger, name: str, version: str) -> Iterator[str]:
    """What other versions of a plugin have worked, which this one does not by itself."""
    if ledger.read(lambda c: plugins.active(c, name)) != version:
        return
    done = ledger.read(lambda c: backfill.of_others(c, name, version))
    redo = f"casparian backfill {name} --redo"
    if done.worked:
        some = counted(done.worked, "file version")
        words = f"older versions of {name} have processed {some}: the rows that they gave stay"
        if done.again == done.worked:
            yield f"{words}; to process them with {version} too, and show its rows instead: {redo}"
        elif done.again:
            yield (
                f"{words}; to process the {done.again} whose content is still there with "
                f"{version} too, and show its rows instead: {redo}"
            )
        else:
            yield f"{words}, since the content is gone and {version} cannot process it"
    if done.waits:
        some = counted(done.waits, "unfinished job")
        yield f"an older version of {name} still has {some}"


def queue_missing(ledger: Ledger) -> int:
    """Route every present file again, after a change of plugins or rules; returns new jobs."""
    routing = ledger.read(Routing)
    queued = sum(len(scan.route_root(ledger, root.id, routing)) for root in scout.roots(ledger))
    if queued:
        ledger.wake()
    return queued


def activate(
    ledger: Ledger, settings: Settings, folder: Path, name: str, version: str, reason: str
) -> str:
    """Make a version the one that gets new jobs, though it was disabled or is older; in words.

    Args:
        folder: where this person's keys are.

    Raises:
        NotFound: there is no such version.
        AuthError: this person's key may not do it.
        ArtifactRefused: the version may not run for another reason.
        ConfigError: one of its sinks cannot be opened, or a plugin may not write there.
    """
    audit.check_text("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> _Recorded:
        plugin = plugins.choose(connection, name, version)
        trusted = trust.read(connection)
        statement = signing.Activate(
            **trusted.link(signer),
            plugin=name, version=version, artifact_sha256=plugin.artifact_hash, reason=reason,
        )  # fmt: skip
        trusted, event = trust.append(connection, trusted, signing.written(signer, statement))
        if refusal := plugins.refusal(plugin, trusted):
            raise ArtifactRefused(refusal, f"casparian plugins show {name} {version}")
        manifest = plugins.manifest_of(plugin.manifest)
        sinks = topics.of_manifest(settings, manifest, versions.active_paths(connection))
        change, again, messages = make_active(connection, settings, name, version, manifest, sinks)
        shown = f"; {change.words}" if change.words else ""
        if change.versions:
            some = counted(change.versions, "file version")
            shown = f"; the rows that it gave of {some} show at once: {change.words}"
        return _Recorded([shown + again, *messages], [event])

    shown, *stays = ledger.change(work, lambda done: done.events).messages
    crashpoint("architect.activated")
    stays += outputs.tell(ledger)
    queued = queue_missing(ledger)
    message = f"{name} {version} gets new jobs{shown}"
    if queued:
        message += f"; {counted(queued, 'job')} queued for known files"
    # What only other artifacts have worked shows their rows until this one has worked it.
    rest = backfill.backfill(ledger, Choice(name, redo=True, had=True)).queued
    if rest:
        message += (
            f"; {counted(rest, 'job')} queued for what only other versions of {name} have "
            "processed: rows that they gave show until then"
        )
    return "\n".join([message, *stays, *_older_work(ledger, name, version)])


def make_active(
    connection: Connection,
    settings: Settings,
    name: str,
    version: str,
    manifest: Manifest,
    sinks: list[TopicSink],
) -> _Activated:
    """Make a deployed version the active one: its rules, subscriptions and topics; and decide anew
    what stands."""
    tag = f"plugin:{name}"
    widened = plugins.replace_rules(connection, tag, manifest.patterns, manifest.priority)
    plugins.subscribe(connection, name, [tag, *manifest.subscriptions], version)
    plugins.add_topics(connection, name, sinks)
    back = db_topics.take_back(connection, name, version, manifest.topics)
    removed = db_outputs.restore_removed(connection, name)
    change = visibility.refresh(connection, Scope(plugin=name))
    now = plugins.topics(connection).get(name, [])
    words = []
    if widened:
        words.append(
            f"{', '.join(widened)} matched only this case; from now on they match any case, "
            "and so more files"
        )
    for topic in filter(manifest.sinks_of, manifest.topics):
        declared = [sink for sink in sinks if sink.topic == topic]
        current = [topics.of_row(topic, r.uri, r.mode) for r in now if r.topic_name == topic]
        if topics.locations_of(settings, declared) != topics.locations_of(settings, current):
            words.append(
                f"topic {topic} still goes to {', '.join(map(str, current))}, not to the "
                f"MANIFEST's sink; to use that: casparian topics set {name} {topic} "
                f"{' '.join(quote(str(sink)) for sink in declared)}"
            )
    for topic in back:
        words += [
            f"topic {topic} had been removed, and is declared again: {sentence}; to bring its rows "
            f"to the present sink: casparian rebuild {topic}"
            for sentence in topics.staying(connection, name, topic)
        ]
    count = counted(len(removed), "job")
    again = f"; {count} queued again, whose rows were removed" if removed else ""
    return _Activated(change, again, words)


def _examine(
    settings: Settings, message: Deploy, ledger_id: str, source_roots: list[str]
) -> _Candidate:
    """Everything that can be checked without looking at who is trusted."""
    policy = Policy.of(settings.gatekeeper)
    statement = signing.verify(Publish, message.statement, message.signature, message.public_key)
    inspection = gatekeeper.inspect(message.source, message.file_name, policy)
    inspection.require()
    manifest = inspection.manifest
    if manifest.contract and not manifest.is_table:
        raise PluginError(
            f"{message.file_name} looks at files for a table that is to be, and is none itself",
            "casparian table add NAME GLOB",
        )
    version = normal_version(statement.version, message.file_name)
    signing.check_published(
        statement, ledger_id, manifest.name, version, message.source, message.lock,
        message.public_key,
    )  # fmt: skip
    check_lock(message.lock, f"the lock of {manifest.name}")
    signed_in = _authenticate(settings, message, statement)
    sinks = topics.of_manifest(settings, manifest, source_roots)
    return _Candidate(message, statement, manifest, inspection.verdict, sinks, signed_in)


def _authenticate(settings: Settings, message: Deploy, statement: Publish) -> dict[str, str]:
    """Who signed in to publish this, proved by their token; empty where nobody needs to.

    Raises:
        AuthError: somebody must have and has not, or is not whom the statement names.
    """
    if not settings.azure.required:
        if isinstance(statement.auth, AzureAuth):
            raise AuthError(
                "the plugin was signed for a publisher who signed in to Azure, but Azure is "
                "not configured here",
                "set AZURE_TENANT_ID and AZURE_CLIENT_ID for the daemon as well",
            )
        return {}
    if not message.token:
        raise AuthError(
            "publishers must sign in to Azure here, but nobody did",
            "set AZURE_TENANT_ID and AZURE_CLIENT_ID, then: casparian publish PLUGIN",
        )
    from casparian_flow.security import identity

    publisher = identity.validate(settings.azure, message.token)
    proved = AzureAuth(
        tenant=publisher.tenant, object_id=publisher.object_id, issuer=publisher.issuer
    )
    if statement.auth != proved:
        raise AuthError(
            "the plugin was signed for another publisher than the one who signed in",
            "publish it again, and sign in as yourself",
        )
    return {"object_id": publisher.object_id, "tenant": publisher.tenant, "name": publisher.name}


def _record(connection: Connection, settings: Settings, candidate: _Candidate) -> _Recorded:
    """One transaction: first key, artifact, rules, subscription, topics."""
    name, version = candidate.manifest.name, candidate.statement.version
    trusted, events = _introduce(connection, candidate)
    introduced = f"{FIRST.format(*trusted.keys.values())}\n" if events else ""
    key = trusted.authorize(candidate.message.public_key, name)
    stopped = trusted.stopped(key.key_id, name, version)
    if _is_there(connection, candidate):
        words = f"{name} {version} is already deployed, with the same content"
        if stopped:
            return _Recorded([f"{words}, and {stopped}"], events)
        _require_fit(connection, trusted, name, version)
        return _Recorded([words], events)
    _check_twin(connection, candidate)
    events.append(_add(connection, candidate, key))
    words = f"{introduced}deployed {name} {version}"
    words += f" (artifact {candidate.statement.artifact_sha256[:12]})"
    if stopped:
        return _Recorded([f"{words}, but not active: {stopped}"], events)
    newest = plugins.newest(connection, name, trusted)
    if newest != version:
        return _Recorded([f"{words}, but not active: {newest} is newer"], events)
    change, again, stays = make_active(
        connection, settings, name, version, candidate.manifest, candidate.sinks
    )
    shown = f"; {change.words}" if change.words else ""
    return _Recorded([words + shown + again, *stays], events)


def _introduce(connection: Connection, candidate: _Candidate) -> tuple[Trust, list[Event]]:
    """Where no key is trusted, trust the publisher's: whoever can write this ledger owns it."""
    message = candidate.message
    trusted = trust.read(connection)
    if message.introduction is None or trusted.seq:
        return trusted, []
    offered = message.introduction
    row = Row(1, TrustKey.kind, offered.payload, message.public_key, offered.signature, b"")
    trusted, event = trust.append(connection, trusted, row)
    return trusted, [event._replace(actor=candidate.signed_in.get("name", ""))]


def _is_there(connection: Connection, candidate: _Candidate) -> bool:
    """Whether the version is deployed with these bytes; not where only outputs of it are known.

    Raises:
        PublishConflict: it is, with others.
    """
    name, version = candidate.manifest.name, candidate.statement.version
    artifact = candidate.statement.artifact_sha256
    known = plugins.find(connection, name, version)
    if known and known.artifact_hash == artifact:
        return bool(known.manifest)
    there = plugins.versions(connection, name, stubs=True)
    if Version(version) not in there:  # by PEP 440: 1.0 is 1.0.0
        return False
    which = there[there.index(Version(version))]
    other = plugins.find(connection, name, str(which))
    what = (
        "already exists with other content"
        if other.manifest
        else (
            "has outputs in sinks that other content gave: its source, or the packages in its lock"
        )
    )
    raise PublishConflict(
        f"{name} {which} {what} (artifact {other.artifact_hash[:12]}, this one {artifact[:12]})",
        f"a published version never changes: publish with --version {_after(there[-1])}",
    )


def _check_twin(connection: Connection, candidate: _Candidate) -> None:
    """
    Raises:
        PublishConflict: another plugin has the same bytes and writes to the same place, so that
            both would give the same outputs.
    """
    artifact, name = candidate.statement.artifact_sha256, candidate.manifest.name
    places = {(sink.topic, sink.uri) for sink in candidate.sinks}
    for twin, topic, uri in plugins.twins(connection, name, artifact):
        if (topic, uri) in places:
            raise PublishConflict(
                f"{name} is the same as plugin {twin}, byte for byte, and both write topic {topic} "
                f"to {uri}: the rows would be the same",
                f"give it topics of its own (--topic), or more patterns to {twin}: casparian rules",
            )


def _require_fit(connection: Connection, trusted: Trust, name: str, version: str) -> None:
    """
    Raises:
        PublishConflict: the version that is there may not run, and its bytes in the name of
            another key do not change that.
    """
    (known,) = plugins.stored(connection, name=name, version=version)
    if refusal := plugins.refusal(known, trusted):
        raise PublishConflict(
            f"{name} {version} is already deployed: {refusal}",
            "a published version never changes: publish with --version "
            f"{_after(plugins.versions(connection, name, stubs=True)[-1])}",
        )


def _add(connection: Connection, candidate: _Candidate, key: Key) -> Event:
    """Insert the artifact, or make its stub whole; the event of it."""
    message, statement, manifest = candidate.message, candidate.statement, candidate.manifest
    columns = {
        "name": manifest.name,
        "version": statement.version,
        "source": message.source,
        "lock": message.lock,
        "manifest": json.dumps(msgspec.to_builtins(manifest), sort_keys=True),
        "artifact_hash": statement.artifact_sha256,
        "public_key": message.public_key,
        "signature": message.signature,
        "publisher": key.key_id,
        "statement": message.statement,
        "verdict": json.dumps(candidate.verdict, sort_keys=True),
    }
    if stub := plugins.find(connection, manifest.name, statement.version):
        plugins.complete(connection, stub.id, **columns)
    else:
        plugins.add(connection, **columns)
    detail = {
        "artifact": statement.artifact_sha256,
        "key": key.key_id,
        "owner": key.owner,
        "declared": sorted(f"{sink.topic} -> {sink}" for sink in candidate.sinks),
        "gatekeeper": candidate.verdict,
        **({"azure": candidate.signed_in} if candidate.signed_in else {}),
    }
    actor = candidate.signed_in.get("name") or key.owner
    return Event("publish", f"plugin {manifest.name} {statement.version}", detail, actor)


def _after(version: Version) -> str:
    major, minor, patch = (*version.release, 0, 0)[:3]
    return f"{major}.{minor}.{patch + 1}"
