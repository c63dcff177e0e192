"""Trust: which keys this ledger trusts with which plugins, and the changes of that.

The rows of the trust log are read whole and replayed each time. Each change is a statement signed
by this person's key: a row of the log, with its row of the audit.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from sqlalchemy import Connection, and_, insert, select, text, update

from casparian_flow.db import access, audit
from casparian_flow.db.access import Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.models import LedgerIdentity, Plugin, PluginConfig, TrustStatement
from casparian_flow.errors import AuthError, CasparianError, NotFound
from casparian_flow.security import keys
from casparian_flow.security.signing import (
    EVERYTHING,
    KINDS,
    Link,
    RevokeKey,
    RotateKey,
    Row,
    TrustKey,
    key_id,
    public_bytes,
    written,
)
from casparian_flow.security.trust import Key, KeyStatus, Trust, introduction, replay

if TYPE_CHECKING:
    from nacl.signing import SigningKey

FIRST = (
    "{} is the first key in this ledger: it is now trusted with every plugin and with "
    "managing keys\n"
)
"""Said of a key that is trusted because no other was."""

# As bytes: what somebody wrote into a row need not be text, and must be refused in words.
_ROWS = text(
    """
    SELECT seq, CAST(kind AS BLOB) AS kind, CAST(payload AS BLOB), CAST(public_key AS BLOB),
           CAST(signature AS BLOB), CAST(countersignature AS BLOB)
    FROM cf_trust_statement ORDER BY seq
    """
)
_AUDITED = text(
    # The words of the index ix_cf_audit_trust, which knows these few rows among all commits.
    """
    SELECT CAST(detail AS BLOB) FROM cf_audit
    WHERE action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable') ORDER BY seq
    """
)


def ledger_id(connection: Connection) -> str:
    """What tells this ledger from every other: 32 hexadecimal digits."""
    return connection.execute(select(LedgerIdentity.id)).scalars().first() or ""


def read(connection: Connection) -> Trust:
    """What the trust log says now; where a row of it does not hold, that, and nothing else."""
    rows = tuple(
        Row(seq, kind.decode("ascii", "backslashreplace"), *parts)
        for seq, kind, *parts in connection.execute(_ROWS)
    )
    audited = tuple(map(_digest, connection.execute(_AUDITED).scalars()))
    return replay(ledger_id(connection), rows, audited)


def append(connection: Connection, before: Trust, row: Row) -> tuple[Trust, Event]:
    """Add a row to the log, in the caller's writing transaction.

    Args:
        before: what the log says now.

    Returns:
        What the log says then; and the row's event, which the caller must write to the audit in
        the same transaction: without it the log does not hold.

    Raises:
        AuthError: the row does not hold after those before it, or they do not.
    """
    after = before.after(row)
    connection.execute(insert(TrustStatement).values(row._asdict()))
    statement = msgspec.json.decode(row.payload, type=KINDS[row.kind])
    detail = {"sha256": row.digest, "signer": statement.signer_key_id, **_fields(statement)}
    return after, Event(row.kind, statement.subject, detail)


def _digest(detail: bytes) -> str:
    """What an audit row says of a row of the log."""
    try:
        return str(json.loads(detail)["sha256"])
    except (ValueError, KeyError, TypeError):
        return ""


def _fields(statement: Link) -> dict[str, Any]:
    """A statement without its place in the log."""
    fields = msgspec.to_builtins(statement)
    return {name: value for name, value in fields.items() if name not in Link.__struct_fields__}


def deactivate(connection: Connection, trusted: Trust) -> list[str]:
    """Route nothing more to active versions that may not run by now; those, as `name version`."""
    rows = connection.execute(
        select(Plugin.name, Plugin.version, Plugin.publisher).join(
            PluginConfig,
            and_(
                PluginConfig.plugin_name == Plugin.name,
                PluginConfig.active_version == Plugin.version,
            ),
        )
    ).all()
    barred = [row for row in rows if trusted.barred(row.publisher, row.name, row.version)]
    names = [row.name for row in barred]
    statement = update(PluginConfig).where(PluginConfig.plugin_name.in_(names))
    connection.execute(statement.values(active_version=None))
    return [f"{row.name} {row.version}" for row in barred]


def person() -> str:
    """This process's user and host: the owner of a key that nobody else has named."""
    return f"{audit.actor()}@{socket.gethostname()}"


# What people change: `casparian keys`.


class _Change(NamedTuple):
    message: str
    events: list[Event]


def listing(ledger: Ledger, folder: Path) -> list[access.Row]:
    """Every key this ledger has trusted, and this person's own if it is none of them.

    Args:
        folder: where this person's keys are.

    Raises:
        AuthError: the trust log does not hold.
    """
    trusted = ledger.read(read)
    if trusted.broken:
        raise AuthError(trusted.broken, "casparian verify")
    own = keys.local_key(folder).verify_key.encode() if keys.has_local_key(folder) else b""
    rows = [_row(key, own) for key in trusted.keys.values()]
    if own and key_id(own) not in trusted.keys:
        unknown: access.Row = {"owner": person(), "plugins": "", "standing": "unknown here"}
        unknown |= {"trusted_at": None, "reason": "", "public_key": own.hex()}
        rows.append({"key_id": key_id(own), "mine": True, **unknown})
    return rows


def _row(key: Key, own: bytes) -> access.Row:
    return {
        "key_id": key.key_id,
        "mine": key.public_key == own.hex(),
        "owner": key.owner,
        "plugins": key.plugins,
        "standing": str(key.standing),
        "trusted_at": key.since,
        "reason": key.reason,
        "public_key": key.public_key,
    }


def trust_key(ledger: Ledger, folder: Path, public_key: str, owner: str, globs: str) -> str:
    """Trust a key with plugins, in place of those it was trusted with; what was done, in words.

    Where the ledger trusts no key, this person's is trusted first.

    Args:
        folder: where this person's keys are.
        public_key: 32 bytes, hexadecimal.
        globs: a glob over names of plugins; `*` includes the right to change keys.

    Raises:
        AuthError: it is not a public key, or this person's key may not do it.
        CasparianError: the owner or the glob is not one; or no key could change keys any more.
    """
    public_bytes(public_key)
    audit.check_text("owner", owner)
    audit.check_text("glob of plugins", globs)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> _Change:
        trusted = read(connection)
        message, events = "", []
        if not (trusted.seq or trusted.broken):
            is_own = signer.verify_key.encode().hex() == public_key
            first = introduction(signer, trusted.ledger_id, owner if is_own else person())
            trusted, event = append(connection, trusted, first)
            (key,) = trusted.keys.values()
            message, events = FIRST.format(key), [event]
            if is_own and globs == EVERYTHING:
                return _Change(message, events)
        statement = TrustKey(
            **trusted.link(signer), public_key=public_key, owner=owner, plugins=globs
        )
        trusted, event = _append_signed(connection, trusted, signer, statement)
        key = trusted.keys[key_id(public_bytes(public_key))]
        beyond = ", and with managing keys" if globs == EVERYTHING else ""
        message += f"{key} is trusted with plugins {globs}{beyond}"
        message += _no_longer_active(deactivate(connection, trusted))
        return _Change(message, [*events, event])

    return ledger.change(work, lambda done: done.events).message


def revoke(ledger: Ledger, folder: Path, prefix: str, reason: str) -> str:
    """Stop everything a key has published, and let it sign nothing more; what was done, in words.

    Args:
        folder: where this person's keys are.
        prefix: the beginning of its id.

    Raises:
        NotFound: no key, or more than one, begins so.
        AuthError: this person's key may not do it.
        CasparianError: it is the last key that may change which are trusted, or no reason.
    """
    audit.check_text("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> _Change:
        trusted = read(connection)
        key = _find(trusted, prefix)
        if key.standing is KeyStatus.REVOKED:
            return _Change(f"{key} is already revoked: {key.reason}", [])
        statement = RevokeKey(**trusted.link(signer), key_id=key.key_id, reason=reason)
        trusted, event = _append_signed(connection, trusted, signer, statement)
        message = f"{key} is revoked: plugins that it has published no longer run"
        message += _no_longer_active(deactivate(connection, trusted))
        return _Change(message, [event])

    return ledger.change(work, lambda done: done.events).message


def _no_longer_active(versions: list[str]) -> str:
    if not versions:
        return ""
    return (
        f"\nno longer active: {', '.join(versions)} (publish a new version with a trusted key, "
        "or activate an older one)"
    )


def rotate(ledger: Ledger, folder: Path) -> str:
    """Put a new key in the place of this person's; what the old one published stays valid.

    A rotation that was interrupted is finished. Where this ledger still trusts a key that was
    rotated elsewhere, the one that signs now takes its place here as well.

    Args:
        folder: where this person's keys are.

    Raises:
        AuthError: this ledger trusts none of this person's keys.
    """
    trusted = ledger.read(read)
    own = keys.local_key(folder)
    if _status(trusted, own) is None and (kept := _kept(trusted, folder)):
        old, new = kept, own
        _hand_on(ledger, old, new)
    else:
        old, new = own, keys.next_key(folder)
        # Trusted already, where we were interrupted between the ledger and the files.
        if _status(trusted, new) is not KeyStatus.TRUSTED:
            _hand_on(ledger, old, new)
        keys.promote(folder)
    names = (key_id(key.verify_key.encode())[:16] for key in (new, old))
    return "key {} signs from now on; key {} is retired".format(*names)


def _hand_on(ledger: Ledger, old: SigningKey, new: SigningKey) -> None:
    def work(connection: Connection) -> Event:
        trusted = read(connection)
        public_key = new.verify_key.encode().hex()
        statement = RotateKey(**trusted.link(old), public_key=public_key)
        return _append_signed(connection, trusted, old, statement, new)[1]

    ledger.change(work, lambda event: [event])


def _kept(trusted: Trust, folder: Path) -> SigningKey | None:
    """A key of this person's that signed before and that this ledger trusts still."""
    kept = keys.kept_keys(folder)
    return next((key for key in kept if _status(trusted, key) is KeyStatus.TRUSTED), None)


def _status(trusted: Trust, key: SigningKey) -> KeyStatus | None:
    found = trusted.keys.get(key_id(key.verify_key.encode()))
    return found.standing if found else None


def _find(trusted: Trust, prefix: str) -> Key:
    """The key whose id begins so.

    Raises:
        NotFound: there is none, or more than one.
    """
    found = [key for name, key in trusted.keys.items() if prefix and name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    words = f"{len(found)} keys have ids that begin" if found else "no key has an id that begins"
    raise NotFound(f"{words} with {prefix!r}", "casparian keys list")


def _append_signed(
    connection: Connection,
    before: Trust,
    signer: SigningKey,
    statement: Link,
    successor: SigningKey | None = None,
) -> tuple[Trust, Event]:
    """`append`, for statements about keys.

    Raises:
        AuthError: the signer may not make it.
        CasparianError: it would be the last one about keys.
    """
    after, event = append(connection, before, written(signer, statement, successor))
    keepers = (key for key in after.keys.values() if key.plugins == EVERYTHING)
    if all(key.standing is not KeyStatus.TRUSTED for key in keepers):
        raise CasparianError(
            "this is the last key that may manage keys: it cannot be revoked",
            "casparian keys rotate   (or first: casparian keys trust PUBLIC_KEY --owner NAME)",
        )
    return after, event
