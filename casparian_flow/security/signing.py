"""Ed25519 signatures of published plugins, and the key of the person who publishes.

What is hashed and what is signed are bytes anybody can rebuild; both are spelled out below, and
changing either would orphan every signature ever made.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from casparian_flow.atomic import exclusive, make_folder, write_once
from casparian_flow.errors import PluginError

if TYPE_CHECKING:
    from nacl.signing import SigningKey

PAYLOAD_TYPE = b"application/vnd.casparian.publish.v1+json"


class Statement(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher signs: these bytes are this version of this plugin."""

    plugin: str
    version: str
    artifact_sha256: str
    """`artifact_hash` of what is published."""


def artifact_hash(source: bytes, lock: str) -> str:
    """SHA-256 of a plugin's source and its locked dependencies, hexadecimal.

    The bytes hashed are `casparian.artifact.v1\\n`, then for each part its name, a space, its
    length in decimal, a newline, and the part: `source`, then `lock` in UTF-8. The lengths keep
    bytes from moving between the parts unseen.
    """
    digest = hashlib.sha256(b"casparian.artifact.v1\n")
    for part, data in ((b"source", source), (b"lock", lock.encode())):
        digest.update(b"%s %d\n" % (part, len(data)))
        digest.update(data)
    return digest.hexdigest()


def key_id(public_key: bytes) -> str:
    """The name of a publisher's key: SHA-256 of its 32 public bytes, hexadecimal."""
    return hashlib.sha256(public_key).hexdigest()


def sign(key: SigningKey, statement: Statement) -> bytes:
    """The 64 byte signature of a statement."""
    return key.sign(_signed_bytes(statement, key.verify_key.encode())).signature


def verify(public_key: bytes, signature: bytes, statement: Statement) -> None:
    """Return if `public_key`, and no other, signed exactly this statement.

    Raises:
        PluginError: it did not, or the key or the signature is malformed.
    """
    from nacl.exceptions import BadSignatureError
    from nacl.signing import VerifyKey

    try:
        VerifyKey(public_key).verify(_signed_bytes(statement, public_key), signature)
    # A key or signature of the wrong length is a ValueError, not a bad signature.
    except (BadSignatureError, ValueError) as error:
        raise PluginError(
            f"signature does not match {statement.plugin} {statement.version}: its name, version, "
            f"source or lock is not what key {key_id(public_key)[:16]} signed",
            "publish the plugin again",
        ) from error


def local_key(folder: Path) -> SigningKey:
    """This person's signing key, created on first use.

    Args:
        folder: holds `default.key`, the seed as 64 hexadecimal digits (0600, in a 0700 folder).

    Raises:
        PluginError: the key cannot be read or created, is not a key, or is not private: another
            owner, or any right of the group or of others, on the file or on the folder.
    """
    from nacl.signing import SigningKey

    path = folder / "default.key"
    try:
        make_folder(folder, mode=0o700)
        _check_private(folder, os.stat(folder), "700")
        if not path.exists():
            _create_key(path)
        with open(path, "rb") as file:
            _check_private(path, os.fstat(file.fileno()), "600")
            text = file.read()
    except OSError as error:
        raise PluginError(
            f"cannot use the signing key {path}: {error.strerror}",
            f"make {folder} a folder that you own and can write to",
        ) from error
    try:
        return SigningKey(bytes.fromhex(text.decode("ascii")))
    except ValueError as error:
        raise PluginError(
            f"{path} is not a signing key: expected 64 hexadecimal digits",
            f"restore it from a backup, or move it away to get a new one: "
            f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.broken')}",
        ) from error


def _create_key(path: Path) -> None:
    """Write a new seed, unless another process was first: a key once used is never replaced."""
    from nacl.signing import SigningKey

    with exclusive(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            write_once(path, SigningKey.generate().encode().hex().encode() + b"\n", mode=0o600)


def _check_private(path: Path, info: os.stat_result, mode: str) -> None:
    quoted = shlex.quote(str(path))
    if info.st_uid != os.geteuid():
        raise PluginError(
            f"{path} belongs to user {info.st_uid}, not to you; it will not be used to sign",
            f"sudo chown {os.geteuid()} {quoted}",
        )
    if info.st_mode & 0o077:
        raise PluginError(
            f"{path} is open to other users (mode {info.st_mode & 0o777:o}); "
            "it will not be used to sign",
            f"chmod {mode} {quoted}",
        )


def _signed_bytes(statement: Statement, public_key: bytes) -> bytes:
    """DSSE's pre-authentication encoding, so that no other kind of message passes for this one.

    `DSSEv1 <length> <type> <length> <payload>`; the payload is JSON with sorted keys, no spaces,
    in UTF-8. The key is named in it from the key in use: a statement cannot name another's.
    """
    fields = {
        "schema": 1,
        **msgspec.structs.asdict(statement),
        "publisher_key_id": key_id(public_key),
    }
    payload = msgspec.json.encode(fields, order="sorted")
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE, len(payload), payload)
