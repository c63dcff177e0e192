"""What people change about keys: list, trust, revoke and rotate them.

Each change is a statement signed by this person's key (`security.keys`), in the trust log of the
ledger (`db.trust`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from casparian_flow.db.access import Connection, Ledger, Row
from casparian_flow.db.audit import Event, check_text
from casparian_flow.db.trust import append, deactivate, person, read
from casparian_flow.errors import AuthError, CasparianError, NotFound
from casparian_flow.security import keys as files
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
from casparian_flow.security.trust import Key, KeyStatus, Trust, introduction
from casparian_flow.services import outputs

if TYPE_CHECKING:
    from nacl.signing import SigningKey

FIRST = (
    "{} is the first key in this ledger: it is now trusted with every plugin and with managing keys"
)
"""Said of a key that is trusted because no other was."""


class Trusted(NamedTuple):
    """What `trust` has done."""

    first: Key | None
    """This person's key, where it was trusted because no other was."""
    key: Key | None
    """The key that was named; None where it is `first`."""
    deactivated: list[str]
    """Active versions that may no longer run, as `name version`."""


class Revoked(NamedTuple):
    """What `revoke` has done."""

    key: Key
    """As it was before the call."""
    already: bool
    """It was revoked before, and nothing was changed."""
    deactivated: list[str]
    """Active versions that may no longer run, as `name version`."""


def listing(ledger: Ledger, folder: Path) -> list[Row]:
    """Every key this ledger has trusted, and this person's own if it is none of them.

    Args:
        folder: where this person's keys are.

    Raises:
        AuthError: the trust log does not hold.
    """
    trusted = ledger.read(read)
    if trusted.broken:
        raise AuthError(trusted.broken, "casparian verify")
    own = files.local_key(folder).verify_key.encode() if files.has_local_key(folder) else b""
    rows = [_row(key, own) for key in trusted.keys.values()]
    if own and key_id(own) not in trusted.keys:
        unknown: Row = {"owner": person(), "plugins": "", "standing": "unknown here"}
        unknown |= {"trusted_at": None, "reason": "", "public_key": own.hex()}
        rows.append({"key_id": key_id(own), "mine": True, **unknown})
    return rows


def _row(key: Key, own: bytes) -> Row:
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


def trust(ledger: Ledger, folder: Path, public_key: str, owner: str, globs: str) -> Trusted:
    """Trust a key with plugins, in place of those it was trusted with.

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
    check_text("owner", owner)
    check_text("glob of plugins", globs)
    signer = files.local_key(folder)

    def work(connection: Connection) -> tuple[Trusted, list[Event]]:
        trusted = read(connection)
        first, events = None, []
        if not (trusted.seq or trusted.broken):
            is_own = signer.verify_key.encode().hex() == public_key
            row = introduction(signer, trusted.ledger_id, owner if is_own else person())
            trusted, event = append(connection, trusted, row)
            (first,), events = trusted.keys.values(), [event]
            if is_own and globs == EVERYTHING:
                return Trusted(first, None, []), events
        statement = TrustKey(
            **trusted.link(signer), public_key=public_key, owner=owner, plugins=globs
        )
        trusted, event = _append_signed(connection, trusted, signer, statement)
        key = trusted.keys[key_id(public_bytes(public_key))]
        return Trusted(first, key, deactivate(connection, trusted)), [*events, event]

    done = ledger.change(work, lambda done: done[1])[0]
    outputs.tell(ledger)  # what stood by a version that is not active any more
    return done


def revoke(ledger: Ledger, folder: Path, prefix: str, reason: str) -> Revoked:
    """Stop everything a key has published, and let it sign nothing more.

    Args:
        folder: where this person's keys are.
        prefix: the beginning of its id.

    Raises:
        NotFound: no key, or more than one, begins so.
        AuthError: this person's key may not do it.
        CasparianError: it is the last key that may change which are trusted, or no reason.
    """
    check_text("reason", reason)
    signer = files.local_key(folder)

    def work(connection: Connection) -> tuple[Revoked, list[Event]]:
        trusted = read(connection)
        key = _find(trusted, prefix)
        if key.standing is KeyStatus.REVOKED:
            return Revoked(key, True, []), []
        statement = RevokeKey(**trusted.link(signer), key_id=key.key_id, reason=reason)
        trusted, event = _append_signed(connection, trusted, signer, statement)
        return Revoked(key, False, deactivate(connection, trusted)), [event]

    done = ledger.change(work, lambda done: done[1])[0]
    outputs.tell(ledger)  # what stood by a version that is not active any more
    return done


def rotate(ledger: Ledger, folder: Path) -> tuple[str, str]:
    """Put a new key in the place of this person's; what the old one published stays valid.

    A rotation that was interrupted is finished. Where this ledger still trusts a key that was
    rotated elsewhere, the one that signs now takes its place here as well.

    Args:
        folder: where this person's keys are.

    Returns:
        The id of the new key, and of the old one.

    Raises:
        AuthError: this ledger trusts none of this person's keys.
    """
    trusted = ledger.read(read)
    own = files.local_key(folder)
    if _status(trusted, own) is None and (kept := _kept(trusted, folder)):
        old, new = kept, own
        _hand_on(ledger, old, new)
    else:
        old, new = own, files.next_key(folder)
        # Trusted already, where we were interrupted between the ledger and the files.
        if _status(trusted, new) is not KeyStatus.TRUSTED:
            _hand_on(ledger, old, new)
        files.promote(folder)
    return key_id(new.verify_key.encode()), key_id(old.verify_key.encode())


def _hand_on(ledger: Ledger, old: SigningKey, new: SigningKey) -> None:
    def work(connection: Connection) -> Event:
        trusted = read(connection)
        public_key = new.verify_key.encode().hex()
        statement = RotateKey(**trusted.link(old), public_key=public_key)
        return _append_signed(connection, trusted, old, statement, new)[1]

    ledger.change(work, lambda event: [event])


def _kept(trusted: Trust, folder: Path) -> SigningKey | None:
    """A key of this person's that signed before and that this ledger trusts still."""
    kept = files.kept_keys(folder)
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
