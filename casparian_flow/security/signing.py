"""Statements that are signed with Ed25519, and how they are encoded and verified.

A statement is a JSON object in canonical form: UTF-8, sorted keys, no spaces, no floats. The
signature covers its DSSE pre-authentication encoding, which contains the statement's kind, so that
one kind cannot pass for another. Payload and signature are stored unchanged: verification checks
the stored bytes first, then parses them. Any change of the encoding invalidates all signatures.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeVar

import msgspec

from casparian_flow.errors import AuthError, PluginError

if TYPE_CHECKING:
    from nacl.signing import SigningKey


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all statements; every field is signed."""

    kind: ClassVar[str]
    """Part of the signed type: `application/vnd.casparian.<kind>.v1+json`."""

    schema: Literal[1] = 1
    ledger_id: str
    """The ledger that the statement is for; it is invalid in any other."""
    issued_at: str
    """Time of signing by the signer's clock: ISO 8601, UTC."""


class LocalAuth(
    msgspec.Struct, frozen=True, tag_field="method", tag="local", forbid_unknown_fields=True
):
    """The publisher is identified by the key alone."""


LOCAL = LocalAuth()


class AzureAuth(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="method",
    tag="azure",
    forbid_unknown_fields=True,
):
    """The publisher also signed in to Azure AD."""

    tenant: str
    object_id: str
    issuer: str


class Publish(Statement, frozen=True):
    """An artifact is this version of this plugin."""

    kind = "publish"

    plugin: str
    version: str
    artifact_sha256: str
    """`artifact_hash` of source and lock."""
    artifact_size: int
    """Bytes of source and lock together."""
    lock_sha256: str
    publisher_key_id: str
    auth: LocalAuth | AzureAuth


class Signed(NamedTuple):
    """A statement's bytes and the signature over them."""

    payload: bytes
    signature: bytes


S = TypeVar("S", bound=Statement)


def artifact_hash(source: bytes, lock: str) -> str:
    """SHA-256 of a plugin's source and its locked dependencies, hexadecimal.

    The bytes hashed are `casparian.artifact.v1\\n`, then for each part its name, a space, its
    length in decimal, a newline, and the part: `source`, then `lock` in UTF-8. The lengths prevent
    that bytes move from one part to the other.
    """
    digest = hashlib.sha256(b"casparian.artifact.v1\n")
    for part, data in ((b"source", source), (b"lock", _lock_bytes(lock))):
        digest.update(b"%s %d\n" % (part, len(data)))
        digest.update(data)
    return digest.hexdigest()


def key_id(public_key: bytes) -> str:
    """A key's id: SHA-256 of its 32 public bytes, hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def now() -> str:
    """The current time in the format of `issued_at`."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def sign(key: SigningKey, statement: Statement) -> Signed:
    """Sign a statement: its canonical bytes and a 64 byte signature."""
    payload = _canonical(statement)
    return Signed(payload, key.sign(_signed_bytes(statement.kind, payload)).signature)


def verify(kind: type[S], payload: bytes, signature: bytes, public_key: bytes) -> S:
    """Verify a signed payload and parse it as a statement of this kind.

    The signature is verified first; an unsigned payload is never parsed.

    Raises:
        AuthError: the signature does not match, the key or the signature is malformed, or the
            payload is not a statement of this kind in canonical form.
    """
    check_signature(kind.kind, payload, signature, public_key)
    try:
        statement = msgspec.json.decode(payload, type=kind)
        # Encoding it again finds a repeated key, a missing field or a space.
        canonical = _canonical(statement) == payload
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AuthError(f"the signed data is not a {kind.kind} statement: {error}") from error
    if not canonical:
        raise AuthError(f"the signed {kind.kind} statement is not in canonical form")
    return statement


def check_signature(kind: str, payload: bytes, signature: bytes, public_key: bytes) -> None:
    """Raise unless this key signed the payload as a statement of this kind.

    Raises:
        AuthError: the signature does not match, or the key or the signature is malformed.
    """
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    try:
        VerifyKey(public_key).verify(_signed_bytes(kind, payload), signature)
    # A key or signature of the wrong length raises a ValueError.
    except (BadSignatureError, ValueError) as error:
        raise AuthError(
            f"signature does not match: key {key_id(public_key)[:16]} did not sign this "
            f"{kind} statement",
            "sign it again",
        ) from error


def publishing(
    ledger_id: str, plugin: str, version: str, source: bytes, lock: str, public_key: bytes,
    auth: LocalAuth | AzureAuth,
) -> Publish:  # fmt: skip
    """The statement that the publisher of an artifact signs."""
    locked = _lock_bytes(lock)
    return Publish(
        ledger_id=ledger_id,
        issued_at=now(),
        plugin=plugin,
        version=version,
        artifact_sha256=artifact_hash(source, lock),
        artifact_size=len(source) + len(locked),
        lock_sha256=hashlib.sha256(locked).hexdigest(),
        publisher_key_id=key_id(public_key),
        auth=auth,
    )


def check_published(
    statement: Publish, ledger_id: str, plugin: str, version: str, source: bytes, lock: str,
    public_key: bytes,
) -> None:  # fmt: skip
    """Raise unless a verified statement describes exactly this artifact.

    Raises:
        PluginError: a field differs; the message names it.
    """
    expected = publishing(ledger_id, plugin, version, source, lock, public_key, statement.auth)
    differing = [
        field
        for field in Publish.__struct_fields__
        if field != "issued_at" and getattr(expected, field) != getattr(statement, field)
    ]
    if differing:
        raise PluginError(
            f"the signed statement does not match: {', '.join(differing)} differ from what key "
            f"{key_id(public_key)[:16]} signed",
            "publish it again",
        )


def _canonical(statement: Statement) -> bytes:
    return msgspec.json.encode(statement, order="sorted")


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    """`DSSEv1 <length> <type> <length> <payload>`."""
    media_type = b"application/vnd.casparian.%s.v1+json" % kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(media_type), media_type, len(payload), payload)


def _lock_bytes(lock: str) -> bytes:
    """The lock in UTF-8. Text from a damaged ledger may hold invalid bytes as surrogates."""
    return lock.encode("utf-8", "surrogateescape")


# The statements of the trust log.

GENESIS = "0" * 64
"""`previous` of the first row."""

EVERYTHING = "*"
"""The glob of a key that may publish every plugin and manage keys."""


class Link(Statement, frozen=True):
    """A statement in the trust log."""

    seq: int
    """Row number, from 1."""
    previous: str
    """`Row.digest` of the previous row; `GENESIS` in the first."""
    signer_key_id: str

    @property
    def subject(self) -> str:
        """The subject of its audit record."""
        return f"key {self.signer_key_id}"


class TrustKey(Link, frozen=True):
    """A key may publish plugins whose names match; also changes an existing key's glob."""

    kind = "trust-key"

    public_key: str
    """32 bytes, hexadecimal."""
    owner: str
    plugins: str
    """Glob of plugin names."""

    @property
    def subject(self) -> str:
        return f"key {key_id(public_bytes(self.public_key))}"


class RevokeKey(Link, frozen=True):
    """A key may not sign any more, and plugins that it published may not run."""

    kind = "revoke-key"

    key_id: str
    reason: str

    @property
    def subject(self) -> str:
        return f"key {self.key_id}"


class RotateKey(Link, frozen=True):
    """A new key replaces the signer's key; plugins that the signer published stay valid."""

    kind = "rotate-key"

    public_key: str


class Activate(Link, frozen=True):
    """A version may run and gets new jobs."""

    kind = "activate"

    plugin: str
    version: str
    artifact_sha256: str
    reason: str

    @property
    def subject(self) -> str:
        return f"plugin {self.plugin} {self.version}"


class Disable(Link, frozen=True):
    """A version, or every version if None, may not run."""

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
    """Decode a public key.

    Raises:
        AuthError: the text is not 64 lower case hexadecimal digits.
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
    """A stored row of the trust log."""

    seq: int
    kind: str
    payload: bytes
    public_key: bytes
    signature: bytes
    countersignature: bytes
    """Signature of the new key over the same bytes, for a rotation; else empty."""

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, for the next row and the audit.

        Each part is preceded by its length (8 bytes, big endian).
        """
        digest = hashlib.sha256()
        for part in (self.payload, self.signature, self.public_key, self.countersignature):
            digest.update(len(part).to_bytes(8) + part)
        return digest.hexdigest()


def written(key: SigningKey, statement: Link, successor: SigningKey | None = None) -> Row:
    """Sign a statement and make its row.

    Args:
        successor: the new key of a rotation; it signs too.
    """
    payload, signature = sign(key, statement)
    second = sign(successor, statement).signature if successor else b""
    public_key = key.verify_key.encode()
    return Row(statement.seq, statement.kind, payload, public_key, signature, second)
