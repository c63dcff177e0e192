"""Signatures hold for exactly what was signed, and the key stays private."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey, VerifyKey

from casparian_flow.errors import PluginError
from casparian_flow.security.signing import (
    Statement,
    artifact_hash,
    key_id,
    local_key,
    sign,
    verify,
)

KEY = SigningKey(bytes(range(32)))
PUBLIC = KEY.verify_key.encode()
STATEMENT = Statement(plugin="sales", version="1.0.0", artifact_sha256="ab" * 32)


def test_the_artifact_hash_is_over_the_documented_bytes() -> None:
    spelled_out = b"casparian.artifact.v1\nsource 4\na\nb\nlock 3\n\xc3\xa9\n"
    assert artifact_hash(b"a\nb\n", "é\n") == hashlib.sha256(spelled_out).hexdigest()


@given(st.binary(), st.text("lock 0123\n"), st.binary(), st.text("lock 0123\n"))
def test_different_artifacts_have_different_hashes(
    source: bytes, lock: str, other_source: bytes, other_lock: str
) -> None:
    same = artifact_hash(source, lock) == artifact_hash(other_source, other_lock)
    assert same == ((source, lock) == (other_source, other_lock))


def test_a_signature_is_over_the_documented_bytes() -> None:
    payload = (
        b'{"artifact_sha256":"' + b"ab" * 32 + b'","plugin":"sales","publisher_key_id":"'
        b"56475aa75463474c0285df5dbf2bcab73da651358839e9b77481b2eab107708c"
        b'","schema":1,"version":"1.0.0"}'
    )
    prefix = b"DSSEv1 41 application/vnd.casparian.publish.v1+json 218 "
    VerifyKey(PUBLIC).verify(prefix + payload, sign(KEY, STATEMENT))


def test_a_key_is_named_by_the_hash_of_its_public_bytes() -> None:
    assert key_id(PUBLIC) == hashlib.sha256(PUBLIC).hexdigest()


def test_what_was_signed_verifies() -> None:
    verify(PUBLIC, sign(KEY, STATEMENT), STATEMENT)


@pytest.mark.parametrize("field", ["plugin", "version", "artifact_sha256"])
def test_a_signature_does_not_hold_for_another_statement(field: str) -> None:
    other = msgspec.structs.replace(STATEMENT, **{field: "another"})
    with pytest.raises(PluginError, match="signature does not match"):
        verify(PUBLIC, sign(KEY, STATEMENT), other)


def test_a_signature_does_not_hold_for_another_key() -> None:
    stranger = SigningKey.generate().verify_key.encode()
    with pytest.raises(PluginError, match=r"signature does not match sales 1\.0\.0"):
        verify(stranger, sign(KEY, STATEMENT), STATEMENT)


def test_a_signature_of_another_type_of_message_does_not_hold() -> None:
    payload = msgspec.json.encode(STATEMENT, order="sorted")
    with pytest.raises(PluginError, match="signature does not match"):
        verify(PUBLIC, KEY.sign(payload).signature, STATEMENT)


@given(st.integers(0, 511))
def test_a_signature_with_one_bit_turned_does_not_hold(bit: int) -> None:
    signature = bytearray(sign(KEY, STATEMENT))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PluginError, match="signature does not match"):
        verify(PUBLIC, bytes(signature), STATEMENT)


@given(public_key=st.binary(max_size=40), signature=st.binary(max_size=70))
def test_any_bytes_as_key_and_signature_are_refused(public_key: bytes, signature: bytes) -> None:
    with pytest.raises(PluginError, match="signature does not match"):
        verify(public_key, signature, STATEMENT)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_signature_of_the_wrong_length_is_refused(length: int) -> None:
    signature = (sign(KEY, STATEMENT) + b"\0")[:length]
    with pytest.raises(PluginError, match="signature does not match"):
        verify(PUBLIC, signature, STATEMENT)


def test_a_public_key_of_small_order_is_refused() -> None:
    """With such a key a signature of zeros would hold for any message."""
    with pytest.raises(PluginError, match="signature does not match"):
        verify(b"\x01" + bytes(31), b"\x01" + bytes(63), STATEMENT)


def test_the_key_is_created_once_private_and_readable_again(tmp_path: Path) -> None:
    folder = tmp_path / "casparian" / "keys"
    created = local_key(folder)
    assert local_key(folder) == created
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert os.stat(folder / "default.key").st_mode & 0o777 == 0o600
    assert bytes.fromhex((folder / "default.key").read_text()) == created.encode()


def test_first_uses_at_the_same_time_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(local_key, [tmp_path / "keys"] * 8))
    assert len({key.encode() for key in keys}) == 1


def test_a_key_from_elsewhere_is_used_from_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = _folder(tmp_path, KEY.encode().hex().encode())
    folder.chmod(0o500)
    assert local_key(folder) == KEY
    assert [path.name for path in folder.iterdir()] == ["default.key"]
    folder.chmod(0o700)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = _folder(tmp_path, KEY.encode().hex().encode()) / "default.key"
    path.chmod(mode)
    with pytest.raises(PluginError, match=f"mode {mode:o}") as refusal:
        local_key(path.parent)
    assert refusal.value.hint == f"chmod 600 {path}"


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o710])
def test_a_folder_open_to_others_is_refused_before_a_key_is_made(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "the keys"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PluginError, match="open to other users") as refusal:
        local_key(folder)
    assert refusal.value.hint == f"chmod 700 '{folder}'"
    assert list(folder.iterdir()) == []


def test_another_persons_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path, KEY.encode().hex().encode())
    somebody_else = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody_else)
    with pytest.raises(PluginError, match="belongs to user") as refusal:
        local_key(folder)
    assert refusal.value.hint == f"sudo chown {somebody_else} {folder}"


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"zz" * 32, b"\xff" * 32])
def test_a_file_that_is_not_a_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    folder = _folder(tmp_path, content)
    with pytest.raises(PluginError, match="is not a signing key") as refusal:
        local_key(folder)
    assert "mv " in refusal.value.hint
    assert (folder / "default.key").read_bytes() == content


def test_a_place_where_no_folder_can_be_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PluginError, match="cannot use the signing key") as refusal:
        local_key(tmp_path / "file" / "keys")
    assert refusal.value.hint


def _folder(tmp_path: Path, key: bytes) -> Path:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "default.key").write_bytes(key)
    (folder / "default.key").chmod(0o600)
    return folder
