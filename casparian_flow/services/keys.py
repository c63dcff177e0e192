"""Keys: who is trusted with what in this ledger, and the changes of it.

Each change is a statement signed by this person's key, in the trust log with its audit row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.db import plugins, routing, trust
from casparian_flow.db.access import Ledger, Row
from casparian_flow.errors import AuthError, CasparianError, NotFound
from casparian_flow.security import keys
from casparian_flow.security.signing import (
    EVERYTHING,
    Link,
    RevokeKey,
    RotateKey,
    TrustKey,
    key_id,
    public_bytes,
    written,
)
from casparian_flow.security.trust import Key, Standing, Trust, introduction
from casparian_flow.services import architect, changes

if TYPE_CHECKING:
    from nacl.signing import SigningKey


def generate(folder: Path) -> tuple[bool, bytes]:
    """This person's key, made where there is none: whether it was made, and its public bytes.

    Raises:
        PluginError: the key cannot be used, because others can read it for one.
    """
    is_new = not keys.has_local_key(folder)
    return is_new, keys.local_key(folder).verify_key.encode()


def listing(ledger: Ledger, folder: Path) -> list[Row]:
    """Every key this ledger has trusted, and this person's own if it is none of them.

    Raises:
        AuthError: the trust log does not hold.
    """
    trusted = ledger.read(trust.read)
    if trusted.broken:
        raise AuthError(trusted.broken, "casparian verify")
    mine = keys.local_key(folder).verify_key.encode() if keys.has_local_key(folder) else b""
    rows = [_row(key, mine) for key in trusted.keys.values()]
    if mine and key_id(mine) not in trusted.keys:
        unknown: Row = {"owner": architect.person(), "plugins": "", "standing": "unknown here"}
        unknown |= {"trusted_at": None, "reason": "", "public_key": mine.hex()}
        rows.append({"key_id": key_id(mine), "mine": True, **unknown})
    return rows


def _row(key: Key, mine: bytes) -> Row:
    return {
        "key_id": key.key_id,
        "mine": key.public_key == mine.hex(),
        "owner": key.owner,
        "plugins": key.plugins,
        "standing": str(key.standing),
        "trusted_at": key.since,
        "reason": key.reason,
        "public_key": key.public_key,
    }


def trust_key(
    ledger: Ledger, settings: Settings, folder: Path, public_key: str, owner: str, globs: str
) -> str:
    """Trust a key with plugins, or with others from now on; what was done, in words.

    Raises:
        AuthError: the key is none, or this person's may not do it.
        CasparianError: the owner or the glob is not one.
    """
    public_bytes(public_key)
    changes.check_words("owner", owner)
    changes.check_words("glob of plugins", globs)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> str:
        own = signer.verify_key.encode().hex() == public_key
        said = _introduce(connection, signer, owner if own else architect.person())
        if said and own and globs == EVERYTHING:
            return said
        statement = TrustKey(
            **trust.read(connection).link(signer),
            public_key=public_key, owner=owner, plugins=globs,
        )  # fmt: skip
        after = _append(connection, signer, statement)
        key = after.keys[key_id(public_bytes(public_key))]
        beyond = ", and with changing which keys are trusted" if globs == EVERYTHING else ""
        words = f"{said}{key} is trusted with plugins {globs}{beyond}"
        return words + _no_longer_active(plugins.deactivate(connection, after))

    words = ledger.write(work)
    changes.ring(settings)
    return words


def _introduce(connection: Connection, signer: SigningKey, owner: str) -> str:
    """Where no key is trusted, trust our own; in words."""
    before = trust.read(connection)
    if before.seq or before.broken:
        return ""
    row = introduction(signer, before.ledger_id, owner)
    (key,) = trust.append(connection, row, routing.actor()).keys.values()
    return architect.FIRST.format(key)


def revoke(ledger: Ledger, settings: Settings, folder: Path, prefix: str, reason: str) -> str:
    """Stop everything a key has published, and let it sign nothing more; in words.

    Args:
        prefix: the beginning of its id.

    Raises:
        NotFound: no key, or more than one, begins so.
        AuthError: this person's key may not do it.
        CasparianError: it is the last key that may change which are trusted, or no reason.
    """
    changes.check_words("reason", reason)
    signer = keys.local_key(folder)

    def work(connection: Connection) -> str:
        before = trust.read(connection)
        key = find(before, prefix)
        if key.standing is Standing.REVOKED:
            return f"{key} is revoked already: {key.reason}"
        statement = RevokeKey(**before.link(signer), key_id=key.key_id, reason=reason)
        after = _append(connection, signer, statement)
        words = f"{key} is revoked: nothing it has published runs any more"
        return words + _no_longer_active(plugins.deactivate(connection, after))

    words = ledger.write(work)
    changes.ring(settings)
    return words


def _no_longer_active(versions: list[str]) -> str:
    if not versions:
        return ""
    return (
        f"\nno longer active: {', '.join(versions)} (publish a new version with a trusted key, "
        "or activate an older one)"
    )


def rotate(ledger: Ledger, settings: Settings, folder: Path) -> str:
    """Put a new key in the place of this person's; what the old one published stays valid.

    A rotation that was interrupted is finished. Where this ledger still trusts a key that was
    rotated elsewhere, the one that signs now takes its place here as well.

    Raises:
        AuthError: this ledger trusts none of this person's keys.
    """
    trusted = ledger.read(trust.read)
    own = keys.local_key(folder)
    if _standing(trusted, own) is None and (kept := _kept(trusted, folder)):
        old, new = kept, own
        _hand_on(ledger, old, new)
    else:
        old, new = own, keys.next_key(folder)
        # Trusted already, where we were interrupted between the ledger and the files.
        if _standing(trusted, new) is not Standing.TRUSTED:
            _hand_on(ledger, old, new)
        keys.promote(folder)
    changes.ring(settings)
    names = (key_id(key.verify_key.encode())[:16] for key in (new, old))
    return "key {} signs from now on, and key {} signs nothing more".format(*names)


def _hand_on(ledger: Ledger, old: SigningKey, new: SigningKey) -> None:
    def work(connection: Connection) -> None:
        link = trust.read(connection).link(old)
        statement = RotateKey(**link, public_key=new.verify_key.encode().hex())
        _append(connection, old, statement, new)

    ledger.write(work)


def _kept(trusted: Trust, folder: Path) -> SigningKey | None:
    """A key of this person's that signed before and that this ledger trusts still."""
    kept = keys.kept_keys(folder)
    return next((key for key in kept if _standing(trusted, key) is Standing.TRUSTED), None)


def _standing(trusted: Trust, key: SigningKey) -> Standing | None:
    found = trusted.keys.get(key_id(key.verify_key.encode()))
    return found.standing if found else None


def find(trusted: Trust, prefix: str) -> Key:
    """The key whose id begins so.

    Raises:
        NotFound: there is none, or more than one.
    """
    found = [key for name, key in trusted.keys.items() if prefix and name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    words = f"{len(found)} keys have ids that begin" if found else "no key has an id that begins"
    raise NotFound(f"{words} with {prefix!r}", "casparian keys list")


def _append(
    connection: Connection,
    signer: SigningKey,
    statement: Link,
    successor: SigningKey | None = None,
) -> Trust:
    """The trust log with one more statement.

    Raises:
        AuthError: the signer may not make it.
        CasparianError: it would be the last one about keys.
    """
    after = trust.append(connection, written(signer, statement, successor), routing.actor())
    keepers = (key for key in after.keys.values() if key.plugins == EVERYTHING)
    if all(key.standing is not Standing.TRUSTED for key in keepers):
        raise CasparianError(
            "then no key would be left that may change which keys are trusted",
            "casparian keys rotate   (or first: casparian keys trust PUBLIC_KEY --owner NAME)",
        )
    return after
