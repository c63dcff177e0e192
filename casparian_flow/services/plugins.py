"""Deployed plugins: what each is and whether it may run; and which version runs.

Activating and disabling are statements signed by this person's key, in the trust log with their
audit rows.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection

from casparian_flow import bundled
from casparian_flow.config import Settings
from casparian_flow.db import plugins, routing, trust, versions, views
from casparian_flow.db.access import Ledger, Row
from casparian_flow.db.models import Plugin
from casparian_flow.db.plugins import Stored
from casparian_flow.errors import ArtifactRefused, NotFound
from casparian_flow.security import keys
from casparian_flow.security.signing import Activate, Disable, written
from casparian_flow.services import architect, changes, topics


def verify(ledger: Ledger, name: str | None) -> list[Row]:
    """Check every version's bytes, signature and key anew: name, version, why it may not run.

    Raises:
        NotFound: no plugin has that name.
    """

    def work(connection: Connection) -> list[Row]:
        trusted = trust.read(connection)
        which = [] if name is None else [Plugin.name == name]
        return [
            {"name": p.name, "version": p.version, "refusal": plugins.refusal(p, trusted)}
            for p in plugins.stored(connection, *which)
        ]

    found = ledger.read(work)
    if name is not None and not found:
        raise _unknown(name)
    return found


def bundled_ones(name: str | None = None) -> list[dict[str, Any]]:
    """What each bundled plugin says of itself; None takes all, else only the one of this name.

    Raises:
        NotFound: none has the name.
    """
    if name is not None and name not in bundled.names():
        known = ", ".join(bundled.names())
        raise NotFound(f"no bundled plugin is named {name!r}", f"one of {known}")
    return [_bundled(each) for each in bundled.names() if name in (None, each)]


def _bundled(name: str) -> dict[str, Any]:
    file = bundled.path(name)
    source, manifest = architect.read_plugin(file)
    description = ast.get_docstring(ast.parse(source)) or ""
    return {
        "name": name,
        "version": manifest.version,
        "reads": description.partition("\n")[0],
        "file": str(file),
        "patterns": manifest.patterns,
        "topics": manifest.topics,
        "options": manifest.options,
        "description": description,
    }


def show(ledger: Ledger, name: str, version: str | None) -> Row:
    """A version in full: who published it, whether it may run, limits, topics, lock and source.

    Args:
        version: None takes the active one, else the newest.

    Raises:
        NotFound: there is none.
    """

    def work(connection: Connection) -> Row:
        plugin = _choose(connection, name, version)
        trusted = trust.read(connection)
        key = trusted.keys.get(plugin.publisher)
        topics = [row for row in views.topics(connection) if row["plugin"] == name]
        return {
            "name": plugin.name,
            "version": plugin.version,
            "active": plugins.active(connection, name) == plugin.version,
            "refusal": plugins.refusal(plugin, trusted),
            "artifact": plugin.artifact_hash,
            "publisher": plugin.publisher,
            "owner": key.owner if key else "",
            "standing": str(key.standing) if key else "unknown here",
            "statement": _json(plugin.statement),
            "verdict": _json(plugin.verdict.encode()),
            "manifest": _json(plugin.manifest.encode()),
            "topics": {row["topic"]: row["uri"] for row in topics},
            "lock": pins(plugin.lock),
            "source": plugin.source.decode("utf-8", "backslashreplace"),
        }

    return ledger.read(work)


def diff(ledger: Ledger, name: str, old: str, new: str) -> str:
    """What changed between two versions: their sources, then the packages they are locked to.

    Raises:
        NotFound: there is no such version.
    """
    before, after = ledger.read(lambda c: [_choose(c, name, version) for version in (old, new)])
    return "\n".join(
        [
            *_diff(f"{name}.py", old, new, _lines(before), _lines(after)),
            *_diff("lock", old, new, pins(before.lock), pins(after.lock)),
        ]
    )


def _diff(what: str, old: str, new: str, before: list[str], after: list[str]) -> Iterator[str]:
    return difflib.unified_diff(before, after, f"{what} {old}", f"{what} {new}", lineterm="")


def _lines(plugin: Stored) -> list[str]:
    return plugin.source.decode("utf-8", "backslashreplace").splitlines()


def pins(lock: str) -> list[str]:
    """The packages a lock pins, without their hashes."""
    return [
        line.partition(" --hash=")[0].rstrip(" \\") for line in lock.splitlines() if "==" in line
    ]


def activate(
    ledger: Ledger, settings: Settings, folder: Path, name: str, version: str, reason: str
) -> str:
    """Make a version the one that takes new jobs, though it was disabled or is older; in words.

    Raises:
        NotFound: there is no such version.
        AuthError: this person's key may not do it.
        ArtifactRefused: the version may not run for another reason.
        ConfigError: one of its sinks cannot be opened, or a plugin may not write there.
    """
    changes.check_words("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> list[str]:
        plugin = _choose(connection, name, version)
        statement = Activate(
            **trust.read(connection).link(signer),
            plugin=name, version=version, artifact_sha256=plugin.artifact_hash, reason=reason,
        )  # fmt: skip
        trusted = trust.append(connection, written(signer, statement), routing.actor())
        if refusal := plugins.refusal(plugin, trusted):
            raise ArtifactRefused(refusal, f"casparian plugins show {name} {version}")
        manifest = plugins.manifest_of(plugin.manifest)
        placed = topics.of_manifest(settings, manifest, versions.active_paths(connection))
        return architect.wire(connection, settings, name, version, manifest, placed)

    stays = ledger.write(work)
    queued = architect.queue_missing(ledger)
    changes.ring(settings)
    words = f"{name} {version} takes new jobs; {queued} queued for files already known"
    return "\n".join([words, *stays])


def disable(
    ledger: Ledger, settings: Settings, folder: Path, name: str, version: str | None, reason: str
) -> str:
    """Run a version, or every version, no more; in words.

    Raises:
        NotFound: there is no such version.
        AuthError: this person's key may not do it.
    """
    changes.check_words("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> list[str]:
        _choose(connection, name, version)
        link = trust.read(connection).link(signer)
        statement = Disable(**link, plugin=name, version=version, reason=reason)
        trusted = trust.append(connection, written(signer, statement), routing.actor())
        return plugins.deactivate(connection, trusted)

    stopped = ledger.write(work)
    changes.ring(settings)
    words = f"{name} {version}" if version else f"every version of {name}"
    words = f"{words} is disabled: jobs that wait for it will fail, and say why"
    return f"{words}; no version takes new jobs" if stopped else words


def _choose(connection: Connection, name: str, version: str | None) -> Stored:
    wanted = version or plugins.active(connection, name)
    found = plugins.stored(connection, Plugin.name == name)
    if not found:
        raise _unknown(name)
    if wanted is None:
        return found[-1]
    for plugin in found:
        if plugin.version == wanted:
            return plugin
    known = ", ".join(plugin.version for plugin in found)
    raise NotFound(f"{name} has no version {wanted}; it has {known}", "casparian plugins list")


def _unknown(name: str) -> NotFound:
    return NotFound(f"no plugin is named {name!r}", "casparian plugins list")


def _json(text: bytes | None) -> Any:
    """What is in a column that holds JSON; None where there is nothing, or nothing of that kind."""
    try:
        return msgspec.json.decode(text or b"")
    except msgspec.MsgspecError:
        return None
