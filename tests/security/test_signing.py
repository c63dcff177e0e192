"""Signatures hold for exactly the bytes that were signed, and those say exactly one thing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey, VerifyKey

from casparian_flow.errors import AuthError, PluginError
from casparian_flow.security.signing import (
    KINDS,
    LOCAL,
    AzureAuth,
    Publish,
    Signed,
    artifact_hash,
    check_published,
    key_id,
    publishing,
    sign,
    verify,
)

KEY = SigningKey(bytes(range(32)))
PUBLIC = KEY.verify_key.encode()
LEDGER = "ab" * 16
AZURE = AzureAuth(tenant="t", object_id="o", issuer="https://login.example/t/v2.0")
STATEMENT = msgspec.structs.replace(
    publishing(LEDGER, "sales", "1.0.0", b"source", "lock", PUBLIC, LOCAL),
    issued_at="2026-01-02T03:04:05Z",
)
SIGNED = sign(KEY, STATEMENT)


def sign_bytes(payload: bytes, kind: str = "publish") -> Signed:
    """What somebody with a key could sign, whatever it is."""
    media_type = f"application/vnd.casparian.{kind}.v1+json".encode()
    head = b"DSSEv1 %d %s %d " % (len(media_type), media_type, len(payload))
    return Signed(payload, KEY.sign(head + payload).signature)


def flips(data: bytes) -> list[bytes]:
    """The data with one bit turned, for every byte of it."""
    return [
        bytes([*data[:i], data[i] ^ 1 << i % 8, *data[i + 1 :]]) for i in range(len(data))
    ]  # fmt: skip


def test_the_artifact_hash_is_over_the_documented_bytes() -> None:
    spelled_out = b"casparian.artifact.v1\nsource 4\na\nb\nlock 3\n\xc3\xa9\n"
    assert artifact_hash(b"a\nb\n", "é\n") == hashlib.sha256(spelled_out).hexdigest()


@given(st.binary(), st.text("lock 0123\n"), st.binary(), st.text("lock 0123\n"))
def test_different_artifacts_have_different_hashes(
    source: bytes, lock: str, other_source: bytes, other_lock: str
) -> None:
    same = artifact_hash(source, lock) == artifact_hash(other_source, other_lock)
    assert same == ((source, lock) == (other_source, other_lock))


def test_a_key_is_named_by_the_hash_of_its_public_bytes() -> None:
    assert key_id(PUBLIC) == hashlib.sha256(PUBLIC).hexdigest()


def test_a_signature_is_over_the_documented_bytes() -> None:
    payload = (
        b'{"artifact_sha256":"%s","artifact_size":10,"auth":{"method":"local"},'
        b'"issued_at":"2026-01-02T03:04:05Z","ledger_id":"%s","lock_sha256":"%s","plugin":"sales",'
        b'"publisher_key_id":"56475aa75463474c0285df5dbf2bcab73da651358839e9b77481b2eab107708c",'
        b'"schema":1,"version":"1.0.0"}'
    ) % (
        artifact_hash(b"source", "lock").encode(), LEDGER.encode(),
        hashlib.sha256(b"lock").hexdigest().encode(),
    )  # fmt: skip
    assert SIGNED.payload == payload
    prefix = b"DSSEv1 41 application/vnd.casparian.publish.v1+json %d " % len(payload)
    VerifyKey(PUBLIC).verify(prefix + payload, SIGNED.signature)


@pytest.mark.parametrize("auth", [LOCAL, AZURE])
def test_what_was_signed_verifies(auth: Any) -> None:
    statement = msgspec.structs.replace(STATEMENT, auth=auth)
    assert verify(Publish, *sign(KEY, statement), PUBLIC) == statement


def test_every_byte_of_payload_signature_and_key_counts() -> None:
    payload, signature = SIGNED
    for other in flips(payload):
        with pytest.raises(AuthError, match="signature does not match"):
            verify(Publish, other, signature, PUBLIC)
    for other in flips(signature):
        with pytest.raises(AuthError, match="signature does not match"):
            verify(Publish, payload, other, PUBLIC)
    for other in flips(PUBLIC):
        with pytest.raises(AuthError, match="signature does not match"):
            verify(Publish, payload, signature, other)


@pytest.mark.parametrize("kind", [*KINDS.values(), Publish])
def test_a_signature_of_another_kind_of_statement_does_not_hold(kind: type[Any]) -> None:
    for other in [*KINDS, Publish.kind]:
        if other != kind.kind:
            with pytest.raises(AuthError, match="signature does not match"):
                verify(kind, *sign_bytes(SIGNED.payload, other), PUBLIC)


def test_a_bare_signature_over_the_payload_does_not_hold() -> None:
    with pytest.raises(AuthError, match="signature does not match"):
        verify(Publish, SIGNED.payload, KEY.sign(SIGNED.payload).signature, PUBLIC)


@given(public_key=st.binary(max_size=40), signature=st.binary(max_size=70))
def test_any_bytes_as_key_and_signature_are_refused(public_key: bytes, signature: bytes) -> None:
    with pytest.raises(AuthError, match="signature does not match"):
        verify(Publish, SIGNED.payload, signature, public_key)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_signature_of_the_wrong_length_is_refused(length: int) -> None:
    signature = (SIGNED.signature + b"\0")[:length]
    with pytest.raises(AuthError, match="signature does not match"):
        verify(Publish, SIGNED.payload, signature, PUBLIC)


def test_a_public_key_of_small_order_is_refused() -> None:
    """With such a key a signature of zeros would hold for any message."""
    with pytest.raises(AuthError, match="signature does not match"):
        verify(Publish, SIGNED.payload, b"\x01" + bytes(63), b"\x01" + bytes(31))


def changed(**fields: Any) -> bytes:
    """The statement's payload with other fields; None leaves one out."""
    payload = {**json.loads(SIGNED.payload), **fields}
    kept = {name: value for name, value in payload.items() if value is not None}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        SIGNED.payload + b" ",
        SIGNED.payload.replace(b":", b": ", 1),
        SIGNED.payload[:-1] + b',"version":"1.0.0"}',
        b'{"version":"2.0.0",' + SIGNED.payload[1:],
        b'{"artifact_sha256":"x",' + SIGNED.payload[1:],
        SIGNED.payload.replace(b"sales", rb"\u0073ales"),
        SIGNED.payload.replace(b'"schema"', rb'"\u0073chema"'),
        SIGNED.payload.replace(b'"artifact_size":10', b'"artifact_size":10.0'),
        SIGNED.payload.replace(b'"artifact_size":10', b'"artifact_size":1e1'),
        SIGNED.payload.replace(b'{"method":"local"}', b'{"method":"local","method":"local"}'),
        SIGNED.payload.replace(b"sales", rb"\ud800"),
        SIGNED.payload.replace(b"sales", b"\xed\xa0\x80"),
        changed(schema=2),
        changed(schema="1"),
        changed(schema=None),
        changed(version=None),
        changed(version=1),
        changed(extra=1),
        changed(auth={"method": "none"}),
        changed(auth={}),
        changed(auth={"method": "azure", "tenant": "t"}),
        changed(auth={"method": "local", "tenant": "t"}),
        b"[" * 100_000,
    ],
    ids=lambda payload: payload[:40].decode("latin-1") + f"({len(payload)})",
)
def test_what_was_signed_but_is_not_one_statement_in_one_form_is_refused(payload: bytes) -> None:
    with pytest.raises(AuthError, match="signed"):
        verify(Publish, *sign_bytes(payload), PUBLIC)


def check(statement: Publish = STATEMENT, **changes: Any) -> None:
    facts = {
        "ledger_id": LEDGER, "plugin": "sales", "version": "1.0.0", "source": b"source",
        "lock": "lock", "public_key": PUBLIC,
    }  # fmt: skip
    check_published(statement, **{**facts, **changes})


@pytest.mark.parametrize("auth", [LOCAL, AZURE])
def test_a_statement_about_what_is_there_passes(auth: Any) -> None:
    check(msgspec.structs.replace(STATEMENT, auth=auth))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ledger_id": "cd" * 16}, "ledger_id"),
        ({"plugin": "hr"}, "plugin"),
        ({"version": "1.0.1"}, "version"),
        ({"source": b"sourcf"}, "artifact_sha256"),
        ({"source": b"sources"}, "artifact_sha256, artifact_size"),
        ({"lock": "lick"}, "artifact_sha256, lock_sha256"),
        ({"source": b"sourcel", "lock": "ock"}, "artifact_sha256, lock_sha256"),
        ({"public_key": bytes(32)}, "publisher_key_id"),
    ],
)
def test_a_statement_about_something_else_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(PluginError, match=f"does not match: {named} differ"):
        check(**change)
