"""Deployed plugins, their subscriptions and their topics."""

from __future__ import annotations

import difflib
import functools
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from packaging.version import Version

from casparian_flow.db import audit, trust, views
from casparian_flow.db.access import Connection, Ledger, Row, execute, execute_many, returned_ids
from casparian_flow.db.routing import tags_of
from casparian_flow.db.states import utcnow
from casparian_flow.errors import ArtifactRefused, CasparianError, NotFound
from casparian_flow.security import keys, signing
from casparian_flow.security.trust import Trust

if TYPE_CHECKING:
    from casparian_flow.security.manifest import Manifest


def find(connection: Connection, name: str, version: str) -> Any:
    """The Plugin row of this version; None where it was never deployed."""
    query = "SELECT * FROM cf_plugin WHERE name = :name AND version = :version"
    return execute(connection, query, name=name, version=version).first()


def versions(connection: Connection, name: str, *, stubs: bool = False) -> list[Version]:
    """Every deployed version of a plugin, oldest first by PEP 440.

    Args:
        stubs: include those of which only outputs were adopted.
    """
    query = "SELECT version FROM cf_plugin WHERE name = :name AND (:stubs OR manifest <> '')"
    return sorted(map(Version, execute(connection, query, name=name, stubs=stubs).scalars()))


def newest(connection: Connection, name: str, trusted: Trust) -> str:
    """The newest version, by PEP 440, that may run; empty where there is none.

    A version that may not run must not keep a later, lower one from being active.
    """
    query = "SELECT version, publisher FROM cf_plugin WHERE name = :name AND statement IS NOT NULL"
    rows = execute(connection, query, name=name)
    fit = [row.version for row in rows if not trusted.barred(row.publisher, name, row.version)]
    return max(fit, key=Version, default="")


def active(connection: Connection, name: str) -> str | None:
    """The version that takes new jobs; None where none does."""
    query = "SELECT active_version FROM cf_plugin_config WHERE plugin_name = :name"
    found: str | None = execute(connection, query, name=name).scalar()
    return found


def add(connection: Connection, **columns: Any) -> int:
    """Insert an artifact; immutable from here on. Returns its id."""
    given = {"deployed_at": utcnow().isoformat(" "), "verdict": "", **columns}
    statement = (
        f"INSERT INTO cf_plugin ({', '.join(given)}) "  # noqa: S608
        f"VALUES ({', '.join(f':{name}' for name in given)}) RETURNING id"
    )
    plugin_id: int = connection.execute(statement, given).scalar_one()
    return plugin_id


def complete(connection: Connection, plugin_id: int, **columns: Any) -> None:
    """Make a stub the plugin whose artifact was published; the database lets nothing else pass."""
    given = {"deployed_at": utcnow().isoformat(" "), **columns}
    changes = ", ".join(f"{name} = :{name}" for name in given)
    statement = f"UPDATE cf_plugin SET {changes} WHERE id = :plugin_id"  # noqa: S608
    connection.execute(statement, {"plugin_id": plugin_id, **given})


def subscribe(connection: Connection, name: str, tags: Sequence[str], active: str) -> None:
    """Make a version the one that takes new jobs, and add to the tags it subscribes to."""
    query = "SELECT subscription_tags FROM cf_plugin_config WHERE plugin_name = :name"
    before = execute(connection, query, name=name).scalar() or ""
    known = tags_of(before)
    added = [tag for tag in tags if tag not in known]
    execute(
        connection,
        """
        INSERT INTO cf_plugin_config (plugin_name, subscription_tags, active_version)
        VALUES (:name, :tags, :active)
        ON CONFLICT (plugin_name) DO UPDATE SET subscription_tags = excluded.subscription_tags,
            active_version = excluded.active_version
        """,
        name=name, tags=",".join(filter(None, [before, *added])), active=active,
    )  # fmt: skip


def replace_rules(
    connection: Connection, tag: str, patterns: Sequence[str], priority: int
) -> list[str]:
    """Give a tag exactly these patterns: what a plugin's own rules become at each publish.

    Returns:
        Those that matched in one case until now, and match in any from now on.
    """
    exact = "SELECT pattern FROM cf_routing_rule WHERE tag = :tag AND NOT any_case"
    before = set(execute(connection, exact, tag=tag).scalars())
    execute(connection, "DELETE FROM cf_routing_rule WHERE tag = :tag", tag=tag)
    execute_many(
        connection,
        "INSERT INTO cf_routing_rule (pattern, tag, priority, any_case) VALUES (?, ?, ?, 1)",
        [(pattern, tag, priority) for pattern in patterns],
    )
    return [pattern for pattern in patterns if pattern in before]


def add_topics(connection: Connection, name: str, sinks: Iterable[tuple[str, str, str]]) -> None:
    """Send topics that have no sink yet to these; what a person set with `topics set` stays.

    Args:
        sinks: topic, sink URI and mode.
    """
    query = "SELECT topic_name FROM cf_topic_config WHERE plugin_name = :name"
    configured = set(execute(connection, query, name=name).scalars())
    execute_many(
        connection,
        "INSERT INTO cf_topic_config (plugin_name, topic_name, uri, mode) VALUES (?, ?, ?, ?)",
        [(name, topic, uri, mode) for topic, uri, mode in sinks if topic not in configured],
    )


def twins(connection: Connection, name: str, artifact: str) -> list[Any]:
    """Plugins of other names that have the artifact: name, and each topic with its sink's URI."""
    query = """
        SELECT t.plugin_name, t.topic_name, t.uri FROM cf_topic_config t
        JOIN cf_plugin p ON p.name = t.plugin_name
        WHERE p.artifact_hash = :artifact AND p.name <> :name
        """
    return execute(connection, query, artifact=artifact, name=name).all()


def topics(connection: Connection) -> dict[str, list[Any]]:
    """Plugin name -> its TopicConfig rows (topic_name, uri, mode)."""
    found: dict[str, list[Any]] = {}
    query = "SELECT plugin_name, topic_name, uri, mode FROM cf_topic_config ORDER BY id"
    for row in connection.execute(query):
        found.setdefault(row.plugin_name, []).append(row)
    return found


def begin_epoch(connection: Connection) -> int:
    """A number for this run of a process that claims jobs; the caller holds the daemon lock."""
    return returned_ids(
        connection,
        "INSERT INTO cf_epoch (started_at, pid, host) VALUES (:now, :pid, :host) RETURNING id",
        now=utcnow().isoformat(" "), pid=os.getpid(), host=socket.gethostname(),
    )[0]  # fmt: skip


def ids(connection: Connection, names: Iterable[str]) -> list[int]:
    """Ids of every deployed version of these plugins."""
    query = "SELECT id FROM cf_plugin WHERE name IN (SELECT value FROM json_each(:names))"
    return returned_ids(connection, query, names=list(names))


def may_be_empty(connection: Connection) -> dict[str, list[str]]:
    """Plugin name -> its topics of data that may stay empty for a file that gives rejects."""
    found: dict[str, list[str]] = {}
    query = "SELECT plugin_name, topic_name FROM cf_empty_topic ORDER BY topic_name"
    for plugin, topic in connection.execute(query):
        found.setdefault(plugin, []).append(topic)
    return found


def topics_of(connection: Connection, plugin: Any) -> list[str]:
    """Every topic a plugin may publish to: what its MANIFEST declares and what people added."""
    placed = [row.topic_name for row in topics(connection).get(plugin.name, [])]
    return list(dict.fromkeys([*manifest_of(plugin.manifest).topics, *placed]))


STUB = (
    "sinks have outputs of it, but this ledger was lost or restored and does not have the plugin: "
    "publish it again, from the same source and lock"
)
EARLIER_FORM = "an earlier release signed it in a weaker form: publish it again under a new version"


class Stored(NamedTuple):
    """A deployed plugin as the ledger has it, unchecked: somebody may have altered its row."""

    id: int
    source: bytes
    public_key: bytes
    signature: bytes
    statement: bytes | None
    name: str
    version: str
    manifest: str
    artifact_hash: str
    publisher: str
    verdict: str
    lock: str
    """Bytes that are not UTF-8 are surrogates."""


# All but the id as bytes: what was damaged must be refused in words, not break the reader.
# The first four stay bytes.
_STORED = ", ".join(f"CAST({column} AS BLOB)" for column in Stored._fields if column != "id")


def stored(connection: Connection, **which: Any) -> list[Stored]:
    """Deployed plugins to be checked, in the order they came.

    Args:
        which: the values that columns have; none means all.
    """
    conditions = " AND ".join(["TRUE", *(f"{column} = :{column}" for column in which)])
    query = f"SELECT id, {_STORED} FROM cf_plugin WHERE {conditions} ORDER BY id"  # noqa: S608
    return [_stored(*row) for row in execute(connection, query, **which)]


def _stored(plugin_id: int, *columns: Any) -> Stored:
    blobs, shown, lock = columns[:4], columns[4:-1], columns[-1]
    texts = (text.decode("utf-8", "backslashreplace") for text in shown)
    return Stored._make([plugin_id, *blobs, *texts, lock.decode("utf-8", "surrogateescape")])


def manifest_of(text: str | bytes) -> Manifest:
    """The MANIFEST that was stored with a plugin; what an older release did not store is 0.

    Raises:
        ArtifactRefused: it is damaged, or that of a stub.
    """
    from casparian_flow.security.manifest import Manifest

    if not text:
        raise ArtifactRefused(STUB)
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ArtifactRefused(f"its stored MANIFEST is damaged: {error}") from error


def fault(plugin: Stored, trusted: Trust) -> str:
    """Why an artifact is not what a trusted key signed; empty where it is.

    Everything is checked anew: the bytes against their hash, the signature over the stored
    statement, the statement against the row, and the signer against the trust log.
    """
    try:
        _check(plugin, trusted)
    except CasparianError as error:
        return error.message
    return ""


def from_earlier(connection: Connection, plugin: Stored) -> bool:
    """Whether an earlier release published an artifact that has no statement, as the audit has it.

    Its row of the audit must name the bytes that are there now, and come before a key was trusted
    in this ledger: without one nothing is published since. So who takes the statement of another
    artifact away is seen.
    """
    made = signing.artifact_hash(plugin.source, plugin.lock)
    if plugin.statement is not None or made != plugin.artifact_hash:
        return False
    trusting = "SELECT min(seq) FROM cf_audit WHERE action = 'trust-key'"
    first = connection.execute(trusting).scalar()
    published = f"""
        {_PUBLISHED} AND (:first IS NULL OR seq < :first)
        AND json_valid(detail) AND json_extract(detail, '$.artifact') = :made
        """
    subject = f"plugin {plugin.name} {plugin.version}"
    found = execute(connection, published, subject=subject, first=first, made=made)
    return found.first() is not None


_PUBLISHED = "SELECT seq FROM cf_audit WHERE action = 'publish' AND subject = :subject"


def is_stub(connection: Connection, plugin: Stored) -> bool:
    """Whether only outputs of a version were adopted: an audit row of `adopt` names its artifact,
    and none says that it was published."""
    if plugin.manifest or plugin.source or plugin.statement is not None:
        return False
    subject = f"{plugin.name} {plugin.version}"
    query = "SELECT detail FROM cf_audit WHERE action = 'adopt'"
    adopted = connection.execute(query).scalars()
    named = any(
        isinstance(detail, dict)
        and (detail.get("plugins") or {}).get(subject) == plugin.artifact_hash
        for detail in map(_json, (row.encode() for row in adopted))
    )
    published = execute(connection, _PUBLISHED, subject=f"plugin {subject}").first()
    return named and published is None


def only_adopted(connection: Connection) -> list[str]:
    """The plugins of which the ledger has stubs only."""
    query = "SELECT name FROM cf_plugin GROUP BY name HAVING max(manifest) = '' ORDER BY name"
    return list(connection.execute(query).scalars())


def in_earlier_form(connection: Connection) -> list[Any]:
    """The active versions (name, version) that may not run, since an earlier release signed them
    in its own form."""
    query = """
        SELECT p.name, p.version FROM cf_plugin p
        JOIN cf_plugin_config c ON c.plugin_name = p.name AND c.active_version = p.version
        WHERE p.manifest <> '' AND p.statement IS NULL ORDER BY p.name
        """
    return connection.execute(query).all()


def _check(plugin: Stored, trusted: Trust) -> None:
    if trusted.broken:
        raise ArtifactRefused(trusted.broken)
    if not plugin.manifest:
        raise ArtifactRefused(STUB)
    if plugin.statement is None:
        raise ArtifactRefused(EARLIER_FORM)
    if signing.artifact_hash(plugin.source, plugin.lock) != plugin.artifact_hash:
        raise ArtifactRefused("its source or lock does not match its artifact hash")
    statement = signing.verify(
        signing.Publish, plugin.statement, plugin.signature, plugin.public_key
    )
    signing.check_published(
        statement, trusted.ledger_id, plugin.name, plugin.version, plugin.source, plugin.lock,
        plugin.public_key,
    )  # fmt: skip
    if plugin.publisher != statement.publisher_key_id:
        raise ArtifactRefused("its publisher is not the key that signed it")
    if manifest_of(plugin.manifest) != _manifest_in(plugin.source, plugin.name):
        raise ArtifactRefused("its stored MANIFEST is not the one in its source")
    if words := trusted.unfit(plugin.publisher, plugin.name):
        raise ArtifactRefused(words)


@functools.lru_cache(maxsize=64)
def _manifest_in(source: bytes, name: str) -> Manifest:
    """Remembered, for parsing takes longer than everything else that is checked before a run."""
    from casparian_flow.security.manifest import read_manifest

    return read_manifest(source, f"{name}.py")


def refusal(plugin: Stored, trusted: Trust) -> str:
    """Why an artifact may not be run; empty where it may."""
    stopped = trusted.stopped(plugin.publisher, plugin.name, plugin.version)
    if words := fault(plugin, trusted) or stopped:
        return f"plugin {plugin.name} {plugin.version} may not run: {words}"
    return ""


# What people ask and change: `casparian plugins`.


def verify(ledger: Ledger, name: str | None) -> list[Row]:
    """Check every version's bytes, signature and key anew: name, version, why it may not run.

    Raises:
        NotFound: no plugin has that name.
    """

    def work(connection: Connection) -> list[Row]:
        trusted = trust.read(connection)
        which = {} if name is None else {"name": name}
        return [
            {"name": p.name, "version": p.version, "refusal": refusal(p, trusted)}
            for p in stored(connection, **which)
        ]

    found = ledger.read(work)
    if name is not None and not found:
        raise _unknown(name)
    return found


def show(ledger: Ledger, name: str, version: str | None) -> Row:
    """A version in full: who published it, whether it may run, limits, topics, lock and source.

    Args:
        version: None takes the active one, else the newest.

    Raises:
        NotFound: there is none.
    """

    def work(connection: Connection) -> Row:
        plugin = choose(connection, name, version)
        trusted = trust.read(connection)
        key = trusted.keys.get(plugin.publisher)
        topics = [row for row in views.topics(connection) if row["plugin"] == name]
        return {
            "name": plugin.name,
            "version": plugin.version,
            "active": active(connection, name) == plugin.version,
            "refusal": refusal(plugin, trusted),
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
    before, after = ledger.read(lambda c: [choose(c, name, version) for version in (old, new)])
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


def disable(ledger: Ledger, folder: Path, name: str, version: str | None, reason: str) -> str:
    """Run a version, or every version, no more; what was done, in words.

    Args:
        folder: where this person's keys are.

    Raises:
        NotFound: there is no such version.
        AuthError: this person's key may not do it.
    """
    audit.check_text("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> tuple[list[str], audit.Event]:
        choose(connection, name, version)
        trusted = trust.read(connection)
        statement = signing.Disable(
            **trusted.link(signer), plugin=name, version=version, reason=reason
        )
        trusted, event = trust.append(connection, trusted, signing.written(signer, statement))
        return trust.deactivate(connection, trusted), event

    stopped, _ = ledger.change(work, lambda done: [done[1]])
    which = f"{name} {version}" if version else f"every version of {name}"
    message = f"{which} is disabled: jobs queued for it will fail, with the reason"
    return f"{message}; no version gets new jobs" if stopped else message


def choose(connection: Connection, name: str, version: str | None) -> Stored:
    """A deployed version; None takes the active one, else the newest.

    Raises:
        NotFound: there is none.
    """
    wanted = version or active(connection, name)
    found = stored(connection, name=name)
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
