"""Signed statements: what Ed25519 signs here, as bytes that anybody can rebuild and check.

A statement is a JSON object in one canonical form: UTF-8, sorted keys, no spaces, no floats. What
is signed is DSSE's pre-authentication encoding of it, which names the kind of statement, so that
none passes for one of another kind. Payload and signature are stored as they are: a signature is
verified over the stored bytes, and the same bytes are then parsed. Changing anything below would
orphan every signature ever made.
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
    """The base of everything that is signed; each field is in the signed bytes."""

    kind: ClassVar[str]
    """Part of the signed type: `application/vnd.casparian.<kind>.v1+json`."""

    schema: Literal[1] = 1
    ledger_id: str
    """The one ledger it is for: in another it says nothing."""
    issued_at: str
    """When it was signed, by the signer's clock: ISO 8601, UTC."""


class LocalAuth(
    msgspec.Struct, frozen=True, tag_field="method", tag="local", forbid_unknown_fields=True
):
    """The publisher is who holds the key."""


LOCAL = LocalAuth()


class AzureAuth(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="method",
    tag="azure",
    forbid_unknown_fields=True,
):
    """The publisher signed in to Azure AD as well."""

    tenant: str
    object_id: str
    issuer: str


class Publish(Statement, frozen=True):
    """These bytes are this version of this plugin."""

    kind = "publish"

    plugin: str
    version: str
    artifact_sha256: str
    """`artifact_hash` of what is published."""
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
    length in decimal, a newline, and the part: `source`, then `lock` in UTF-8. The lengths keep
    bytes from moving between the parts unseen.
    """
    digest = hashlib.sha256(b"casparian.artifact.v1\n")
    for part, data in ((b"source", source), (b"lock", _lock_bytes(lock))):
        digest.update(b"%s %d\n" % (part, len(data)))
        digest.update(data)
    return digest.hexdigest()


def key_id(public_key: bytes) -> str:
    """The name of a key: SHA-256 of its 32 public bytes, hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def now() -> str:
    """The time that a statement carries."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def sign(key: SigningKey, statement: Statement) -> Signed:
    """A statement's canonical bytes and its 64 byte signature."""
    payload = _canonical(statement)
    return Signed(payload, key.sign(_signed_bytes(statement.kind, payload)).signature)


def verify(kind: type[S], payload: bytes, signature: bytes, public_key: bytes) -> S:
    """The statement in these bytes, if this key signed them as one of this kind.

    The signature is verified first; nothing of a payload that nobody signed is parsed.

    Raises:
        AuthError: it did not sign them, the key or the signature is malformed, or what it signed
            is not such a statement in its canonical form.
    """
    check_signature(kind.kind, payload, signature, public_key)
    try:
        statement = msgspec.json.decode(payload, type=kind)
        # A key that is there twice, a field that is missing, a space: written again, it differs.
        canonical = _canonical(statement) == payload
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AuthError(f"what was signed is not a {kind.kind} statement: {error}") from error
    if not canonical:
        raise AuthError(f"what was signed is a {kind.kind} statement, but not in canonical form")
    return statement


def check_signature(kind: str, payload: bytes, signature: bytes, public_key: bytes) -> None:
    """Return if this key, and no other, signed this payload as a statement of this kind.

    Raises:
        AuthError: it did not, or the key or the signature is malformed.
    """
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    try:
        VerifyKey(public_key).verify(_signed_bytes(kind, payload), signature)
    # A key or signature of the wrong length is a ValueError, not a bad signature.
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
    """What the publisher of these bytes has to sign."""
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
    """Return if a verified statement is about exactly this; all is rebuilt and compared.

    Raises:
        PluginError: it is about something else; the message names what differs.
    """
    found = publishing(ledger_id, plugin, version, source, lock, public_key, statement.auth)
    differing = [
        field
        for field in Publish.__struct_fields__
        if field != "issued_at" and getattr(found, field) != getattr(statement, field)
    ]
    if differing:
        raise PluginError(
            f"the signed statement is about something else: {', '.join(differing)} of what is "
            f"here differs from what key {key_id(public_key)[:16]} signed",
            "publish it again",
        )


def _canonical(statement: Statement) -> bytes:
    return msgspec.json.encode(statement, order="sorted")


def _signed_bytes(kind: str, payload: bytes) -> bytes:
    """`DSSEv1 <length> <type> <length> <payload>`."""
    media_type = b"application/vnd.casparian.%s.v1+json" % kind.encode()
    return b"DSSEv1 %d %s %d %s" % (len(media_type), media_type, len(payload), payload)


def _lock_bytes(lock: str) -> bytes:
    """A lock read from a damaged ledger may hold bytes that are not UTF-8, as surrogates."""
    return lock.encode("utf-8", "surrogateescape")


# The statements of the trust log: what people sign about keys and plugins.


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
        return f"key {key_id(public_bytes(self.public_key))}"


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
    payload, signature = sign(key, statement)
    second = sign(successor, statement).signature if successor else b""
    public_key = key.verify_key.encode()
    return Row(statement.seq, statement.kind, payload, public_key, signature, second)
