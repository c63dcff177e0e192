"""The statements of the trust log: what people sign about keys and plugins."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from casparian_flow.errors import AuthError
from casparian_flow.security import signing
from casparian_flow.security.signing import Statement

if TYPE_CHECKING:
    from nacl.signing import SigningKey

GENESIS = "0" * 64
"""What the first row has as the hash of the row before it."""

EVERYTHING = "*"
"""The glob of a key that may publish every plugin, and change which keys are trusted."""


class Link(Statement, frozen=True):
    """A statement in the trust log."""

    seq: int
    """1 for the first of the ledger, and on."""
    previous: str
    """`Row.digest` of the row before; `GENESIS` in the first."""
    signer_key_id: str

    @property
    def subject(self) -> str:
        """What it is about, as the audit names it."""
        return f"key {self.signer_key_id}"


class TrustKey(Link, frozen=True):
    """A key may publish plugins whose names match, or may so from now on."""

    kind = "trust-key"

    public_key: str
    """32 bytes, hexadecimal."""
    owner: str
    plugins: str
    """A glob over names of plugins."""

    @property
    def subject(self) -> str:
        return f"key {signing.key_id(public_bytes(self.public_key))}"


class RevokeKey(Link, frozen=True):
    """Nothing that a key has published may run, and it signs nothing any more."""

    kind = "revoke-key"

    key_id: str
    reason: str

    @property
    def subject(self) -> str:
        return f"key {self.key_id}"


class RotateKey(Link, frozen=True):
    """Another key of the signer's takes its place; what the signer published stays valid."""

    kind = "rotate-key"

    public_key: str


class Activate(Link, frozen=True):
    """A version may run, and takes new jobs."""

    kind = "activate"

    plugin: str
    version: str
    artifact_sha256: str
    reason: str

    @property
    def subject(self) -> str:
        return f"plugin {self.plugin} {self.version}"


class Disable(Link, frozen=True):
    """A version, or every version, may not run."""

    kind = "disable"

    plugin: str
    version: str | None
    reason: str

    @property
    def subject(self) -> str:
        return f"plugin {self.plugin} {self.version}" if self.version else f"plugin {self.plugin}"


KINDS: dict[str, type[Link]] = {
    kind.kind: kind for kind in (TrustKey, RevokeKey, RotateKey, Activate, Disable)
}


def public_bytes(text: str) -> bytes:
    """A public key as people write it.

    Raises:
        AuthError: it is not 64 hexadecimal digits, in small letters.
    """
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32 or key.hex() != text:
        raise AuthError(
            f"{text[:80]!r} is not a public key: expected 64 hexadecimal digits",
            "its owner runs: casparian keys generate",
        )
    return key


class Row(NamedTuple):
    """A row of the trust log, as it is stored."""

    seq: int
    kind: str
    payload: bytes
    public_key: bytes
    signature: bytes
    countersignature: bytes
    """By the new key over the same bytes, where a key is rotated; else empty."""

    @property
    def digest(self) -> str:
        """What the next row and the audit say of this one: SHA-256, hexadecimal.

        Each part is preceded by its length (8 bytes, big endian).
        """
        digest = hashlib.sha256()
        for part in (self.payload, self.signature, self.public_key, self.countersignature):
            digest.update(len(part).to_bytes(8) + part)
        return digest.hexdigest()


def written(key: SigningKey, statement: Link, successor: SigningKey | None = None) -> Row:
    """A statement, signed, as the row it becomes.

    Args:
        successor: the new key, where the statement rotates; it signs as well.
    """
    payload, signature = signing.sign(key, statement)
    second = signing.sign(successor, statement).signature if successor else b""
    public_key = key.verify_key.encode()
    return Row(statement.seq, statement.kind, payload, public_key, signature, second)
