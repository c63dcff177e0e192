"""The Architect: a signed plugin becomes a deployed one, wired to rules, topics and files.

The publisher's side makes a `Deploy`; the ledger's side trusts nothing it says: it reads the
MANIFEST again (by AST, never running the code), rebuilds the hash and checks the signature.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from packaging.version import Version
from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.db import audit, plugins
from casparian_flow.db.access import Ledger
from casparian_flow.db.routing import Routing
from casparian_flow.engine import sinks
from casparian_flow.errors import PluginError, PublishConflict
from casparian_flow.protocol import Deploy
from casparian_flow.security import signing
from casparian_flow.security.manifest import Manifest, normal_version, read_manifest
from casparian_flow.services import scan, scout


def next_version(ledger: Ledger, name: str) -> str:
    """The patch release after the newest one deployed; 1.0.0 for a new plugin."""
    known = ledger.read(lambda c: plugins.versions(c, name))
    return _after(known[-1]) if known else "1.0.0"


def read_plugin(file: Path) -> tuple[bytes, Manifest]:
    """A plugin file's bytes and its MANIFEST.

    Raises:
        PluginError: it cannot be read, or is not a plugin; the message says what is missing.
    """
    try:
        source = file.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read {file}: {error.strerror}", "check the path") from error
    return source, read_manifest(source, file.name)


def sign(file: Path, source: bytes, lock: str, name: str, version: str, keys: Path) -> Deploy:
    """Sign a plugin with this person's key, which is made on first use.

    Raises:
        PluginError: the key cannot be used, because others can read it for one.
    """
    key = signing.local_key(keys)
    statement = signing.Statement(
        plugin=name, version=version, artifact_sha256=signing.artifact_hash(source, lock)
    )
    return Deploy(
        file_name=file.name,
        version=version,
        source=source,
        lock=lock,
        public_key=key.verify_key.encode(),
        signature=signing.sign(key, statement),
    )


def deploy(ledger: Ledger, settings: Settings, message: Deploy) -> str:
    """Check and record a plugin, wire it, and queue the files it wants; says what it did.

    Deploying the same bytes again changes nothing and is no error.

    Raises:
        PluginError: it is not what was signed, or is not a plugin.
        PublishConflict: the version exists with other bytes.
        ConfigError: one of its sinks cannot be opened.
    """
    manifest = read_manifest(message.source, message.file_name)
    version = normal_version(message.version, message.file_name)
    artifact = signing.artifact_hash(message.source, message.lock)
    statement = signing.Statement(plugin=manifest.name, version=version, artifact_sha256=artifact)
    signing.verify(message.public_key, message.signature, statement)
    default = settings.output.default_uri
    uris = {topic: manifest.sinks.get(topic, default) for topic in manifest.topics}
    for uri in uris.values():
        sinks.resolve(uri, settings.home)
    row = {
        "name": manifest.name,
        "version": version,
        "source": message.source,
        "lock": message.lock,
        "manifest": json.dumps(msgspec.to_builtins(manifest), sort_keys=True),
        "artifact_hash": artifact,
        "public_key": message.public_key,
        "signature": message.signature,
        "publisher": signing.key_id(message.public_key),
    }
    is_new = ledger.write(lambda c: _record(c, row, manifest, uris))
    if not is_new:
        return f"{manifest.name} {version} is deployed already, with the same bytes"
    queued = queue_missing(ledger)
    return (
        f"deployed {manifest.name} {version} (artifact {artifact[:12]}); "
        f"{queued} job{'' if queued == 1 else 's'} queued for files already known"
    )


def queue_missing(ledger: Ledger) -> int:
    """Route every present file again, after a change of plugins or rules; returns new jobs."""
    routing = ledger.read(Routing)
    return sum(len(scan.route_root(ledger, root.id, routing)) for root in scout.roots(ledger))


def _record(
    connection: Connection, row: dict[str, Any], manifest: Manifest, uris: dict[str, str]
) -> bool:
    """One transaction: artifact, rules, subscription, topics, audit. False: it was there."""
    name, version = row["name"], row["version"]
    if known := plugins.find(connection, name, version):
        if known.artifact_hash == row["artifact_hash"]:
            return False
        raise PublishConflict(
            f"{name} {version} exists already with other bytes "
            f"(artifact {known.artifact_hash[:12]}, this one {row['artifact_hash'][:12]})",
            f"a published version never changes: publish with --version {_after(Version(version))}",
        )
    plugins.add(connection, **row)
    newest = plugins.versions(connection, name)[-1]
    if newest == Version(version):
        tag = f"plugin:{name}"
        plugins.replace_rules(connection, tag, manifest.patterns, manifest.priority)
        plugins.subscribe(connection, name, [tag, *manifest.subscriptions], version)
    plugins.add_topics(connection, name, uris)
    detail = {"artifact": row["artifact_hash"], "key": row["publisher"], "topics": uris}
    audit.append(
        connection, "publisher", [audit.Event("publish", f"plugin {name} {version}", detail)]
    )
    return True


def _after(version: Version) -> str:
    major, minor, patch = (*version.release, 0, 0)[:3]
    return f"{major}.{minor}.{patch + 1}"
