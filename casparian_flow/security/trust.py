"""Trust in keys and plugins, computed by replaying the signed trust log.

The trust log is a chain of signed statements, each with the hash of the previous one. A key signs
the first about itself; each later one must be signed by a key that the log so far authorizes. Trust
is always computed from the signed rows, never read from a table. This module is pure: `db.trust`
reads and appends the rows.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from casparian_flow.errors import AuthError
from casparian_flow.security import signing
from casparian_flow.security.signing import (
    EVERYTHING,
    GENESIS,
    KINDS,
    Activate,
    Disable,
    Link,
    RevokeKey,
    RotateKey,
    Row,
    TrustKey,
    public_bytes,
    written,
)

if TYPE_CHECKING:
    from nacl.signing import SigningKey


class KeyStatus(StrEnum):
    """What a key that is known may do."""

    TRUSTED = "trusted"
    RETIRED = "retired"
    REVOKED = "revoked"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key of the trust log."""

    key_id: str
    public_key: str
    """32 bytes, hexadecimal."""
    owner: str
    plugins: str
    since: str
    """When it was trusted."""
    standing: KeyStatus = KeyStatus.TRUSTED
    reason: str = ""
    """Why it was revoked, or which key took its place."""

    def covers(self, plugin: str) -> bool:
        """Whether the key's glob matches the plugin's name."""
        return fnmatch.fnmatchcase(plugin, self.plugins)

    def __str__(self) -> str:
        return f"key {self.key_id[:16]} of {self.owner}"


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """The state of trust after some row of the log; immutable."""

    ledger_id: str
    keys: Mapping[str, Key] = {}
    """Key id -> key, for every key that was ever trusted."""
    disabled: Mapping[tuple[str, str | None], str] = {}
    """(plugin, version or None for all) -> reason; empty: activated again."""
    activated: Mapping[tuple[str, str], str] = {}
    """(plugin, version) -> SHA-256 of the artifact that was activated last."""
    seq: int = 0
    """Number of the last row."""
    head: str = GENESIS
    """Digest of the last row."""
    broken: str = ""
    """Which row is invalid, and why; then nothing is trusted. Empty if all rows are valid."""

    def authorize(self, public_key: bytes, plugin: str | None) -> Key:
        """Return the key if it may act for this plugin now.

        Args:
            plugin: the plugin's name; None if the statement is about a key.

        Raises:
            AuthError: the log is invalid, or the key is unknown, retired, revoked or not trusted
                with this plugin.
        """
        key = self._trusted(public_key)
        if plugin is None and key.plugins != EVERYTHING:
            raise AuthError(
                f"{key} is trusted with plugins {key.plugins}, but not with managing keys",
                f"only a key trusted with {EVERYTHING!r} can do this: casparian keys list",
            )
        if plugin is not None and not key.covers(plugin):
            raise AuthError(
                f"{key} is trusted with plugins {key.plugins}, but not with {plugin}",
                f"somebody whose key is trusted with {EVERYTHING!r} runs: casparian keys trust "
                f"{key.public_key} --owner NAME --plugins GLOB",
            )
        return key

    def _trusted(self, public_key: bytes) -> Key:
        if self.broken:
            raise AuthError(self.broken, "casparian verify")
        found = self.keys.get(signing.key_id(public_key))
        if found is None:
            raise self._unknown(public_key)
        if found.standing is not KeyStatus.TRUSTED:
            raise AuthError(
                f"{found} is {found.standing}: {found.reason}",
                "sign with a key that is trusted: casparian keys list",
            )
        return found

    def _unknown(self, public_key: bytes) -> AuthError:
        name = signing.key_id(public_key)[:16]
        if not self.keys:
            return AuthError(
                "this ledger trusts no key yet",
                "casparian publish PLUGIN   (your key becomes the first)",
            )
        return AuthError(
            f"key {name} is not trusted in this ledger",
            f"somebody whose key is trusted runs: casparian keys trust {public_key.hex()} "
            "--owner NAME",
        )

    def unfit(self, key_id: str, plugin: str) -> str:
        """Why a key was never allowed to publish this plugin; empty if it was or is."""
        key = self.keys.get(key_id)
        if key is None:
            return f"key {key_id[:16]}, which signed it, was never trusted in this ledger"
        if not key.covers(plugin):
            return f"{key}, which signed it, is trusted only with plugins {key.plugins}"
        return ""

    def stopped(self, key_id: str, plugin: str, version: str) -> str:
        """Why this version was stopped: key revoked or plugin disabled; empty if it was not."""
        key = self.keys.get(key_id)
        if key and key.standing is KeyStatus.REVOKED:
            return f"{key}, which signed it, was revoked: {key.reason}"
        every = self.disabled.get((plugin, None), "")
        if reason := self.disabled.get((plugin, version), every):
            return f"it was disabled: {reason}"
        return ""

    def barred(self, key_id: str, plugin: str, version: str) -> str:
        """Why this version may not run (`unfit` or `stopped`); empty if it may."""
        return self.unfit(key_id, plugin) or self.stopped(key_id, plugin, version)

    def link(self, key: SigningKey) -> dict[str, Any]:
        """The fields of `Link` for the next statement, signed by this key."""
        return {
            "ledger_id": self.ledger_id,
            "issued_at": signing.now(),
            "seq": self.seq + 1,
            "previous": self.head,
            "signer_key_id": signing.key_id(key.verify_key.encode()),
        }

    def after(self, row: Row) -> Trust:
        """The trust after one more row.

        Raises:
            AuthError: the row is not the next one, its signature is invalid, or its signer is not
                authorized.
        """
        if self.broken:
            raise AuthError(self.broken, "casparian verify")
        if row.seq != self.seq + 1:
            raise AuthError(f"row {self.seq + 1} of the trust log is missing")
        kind = KINDS.get(row.kind)
        if kind is None:
            raise AuthError(f"{row.kind!r} is not a kind of statement")
        statement = signing.verify(kind, row.payload, row.signature, row.public_key)
        if statement.ledger_id != self.ledger_id:
            raise AuthError("the statement is for another ledger")
        if (statement.seq, statement.previous) != (row.seq, self.head):
            raise AuthError("the statement does not follow the one before it")
        if statement.signer_key_id != signing.key_id(row.public_key):
            raise AuthError("the statement names another key than the one that signed it")
        if row.countersignature and not isinstance(statement, RotateKey):
            raise AuthError("the statement has a second signature, which it must not have")
        changed = self._apply(statement, row)
        return msgspec.structs.replace(changed, seq=row.seq, head=row.digest)

    def _apply(self, statement: Link, row: Row) -> Trust:
        match statement:
            case TrustKey():
                return self._trust(statement, row)
            case RevokeKey(key_id=key_id, reason=reason):
                self.authorize(row.public_key, None)
                if key_id not in self.keys:
                    raise AuthError(f"key {key_id[:16]} was never trusted")
                return self._with(self.keys[key_id], standing=KeyStatus.REVOKED, reason=reason)
            case RotateKey():
                return self._rotate(statement, row)
            case Activate(plugin=plugin, version=version):
                self.authorize(row.public_key, plugin)
                artifacts = {**self.activated, (plugin, version): statement.artifact_sha256}
                able = self._with_disabled({**self.disabled, (plugin, version): ""})
                return msgspec.structs.replace(able, activated=artifacts)
            case Disable(plugin=plugin, version=None, reason=reason):
                self.authorize(row.public_key, plugin)
                others = {what: why for what, why in self.disabled.items() if what[0] != plugin}
                return self._with_disabled({**others, (plugin, None): reason})
            case Disable(plugin=plugin, version=version, reason=reason):
                self.authorize(row.public_key, plugin)
                return self._with_disabled({**self.disabled, (plugin, version): reason})
        raise AuthError(f"{statement.kind} is an unknown kind of statement")

    def _trust(self, statement: TrustKey, row: Row) -> Trust:
        if not self.keys:
            if statement.public_key != row.public_key.hex() or statement.plugins != EVERYTHING:
                raise AuthError("the first key must be trusted by itself, and with everything")
        else:
            self.authorize(row.public_key, None)
        added = Key(
            key_id=signing.key_id(public_bytes(statement.public_key)),
            public_key=statement.public_key,
            owner=statement.owner,
            plugins=statement.plugins,
            since=statement.issued_at,
        )
        known = self.keys.get(added.key_id)
        if known and known.standing is not KeyStatus.TRUSTED:
            raise AuthError(f"{known} is already {known.standing}", "trust another key")
        return self._with(added)

    def _rotate(self, statement: RotateKey, row: Row) -> Trust:
        """A key may pass its own rights to a new key; both sign the statement."""
        earlier = self._trusted(row.public_key)
        new = public_bytes(statement.public_key)
        signing.check_signature(statement.kind, row.payload, row.countersignature, new)
        if known := self.keys.get(signing.key_id(new)):
            raise AuthError(f"{known} is already known: a rotation needs a new key")
        successor = msgspec.structs.replace(
            earlier,
            key_id=signing.key_id(new),
            public_key=statement.public_key,
            since=statement.issued_at,
        )
        reason = f"key {successor.key_id[:16]} took its place"
        return self._with(earlier, standing=KeyStatus.RETIRED, reason=reason)._with(successor)

    def _with(self, key: Key, **changes: Any) -> Trust:
        changed = msgspec.structs.replace(key, **changes)
        return msgspec.structs.replace(self, keys={**self.keys, key.key_id: changed})

    def _with_disabled(self, disabled: dict[tuple[str, str | None], str]) -> Trust:
        return msgspec.structs.replace(self, disabled=disabled)


def introduction(key: SigningKey, ledger_id: str, owner: str) -> Row:
    """The first row of a trust log: a key trusts itself with `EVERYTHING`."""
    public_key = key.verify_key.encode().hex()
    link = Trust(ledger_id=ledger_id).link(key)
    return written(key, TrustKey(**link, public_key=public_key, owner=owner, plugins=EVERYTHING))


@functools.lru_cache(maxsize=4)
def replay(ledger_id: str, rows: tuple[Row, ...], audited: tuple[str, ...]) -> Trust:
    """The trust after all rows. Cached, since it is needed before every run.

    Args:
        audited: the rows' digests in the audit, which reveal a log whose last rows are missing.
    """
    trust = Trust(ledger_id=ledger_id)
    try:
        for row in rows:
            trust = trust.after(row)
    except AuthError as error:
        fault = f"row {trust.seq + 1} of the trust log is not valid: {error.message}"
        return msgspec.structs.replace(trust, broken=fault)
    digests = [row.digest for row in rows]
    for number, pair in enumerate(itertools.zip_longest(digests, audited), 1):
        if pair[0] != pair[1]:
            fault = "is missing, but the audit has it" if pair[0] is None else "is not in the audit"
            fault = f"row {number} of the trust log {fault}"
            return msgspec.structs.replace(trust, broken=fault)
    return trust
