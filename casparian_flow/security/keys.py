"""The user's signing keys, one private file each.

default.key     the key that signs
next.key        the new key of a rotation that is not finished; `promote` makes it default.key
<key id>.key    an earlier key; other ledgers may still trust it
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from casparian_flow.durable import exclusive, fsync_path, make_folder, write_once
from casparian_flow.errors import PluginError
from casparian_flow.security.signing import key_id

if TYPE_CHECKING:
    from nacl.signing import SigningKey

_DEFAULT = "default.key"
_NEXT = "next.key"


def has_local_key(folder: Path) -> bool:
    """Whether the user has a signing key."""
    return (folder / _DEFAULT).exists()


def local_key(folder: Path) -> SigningKey:
    """The user's signing key, created on first use.

    Args:
        folder: holds `default.key`, the seed as 64 hexadecimal digits (0600, in a 0700 folder).

    Raises:
        PluginError: the key cannot be read or created, is not a key, or is not private: the file
            or the folder has another owner, or gives rights to group or others.
    """
    return _key(folder / _DEFAULT)


def next_key(folder: Path) -> SigningKey:
    """The new key of a rotation, created on first use.

    Raises:
        PluginError: as `local_key`.
    """
    return _key(folder / _NEXT)


def kept_keys(folder: Path) -> list[SigningKey]:
    """The user's earlier signing keys.

    Raises:
        PluginError: as `local_key`.
    """
    own = {_DEFAULT, _NEXT}
    return [_key(path) for path in sorted(folder.glob("*.key")) if path.name not in own]


def promote(folder: Path) -> None:
    """Make `next.key` the signing key; the earlier key is kept under its key id.

    Raises:
        PluginError: the files cannot be changed.
    """
    earlier = local_key(folder).verify_key.encode()
    try:
        with contextlib.suppress(FileExistsError):
            os.link(folder / _DEFAULT, folder / f"{key_id(earlier)}.key")
        fsync_path(folder)
        os.replace(folder / _NEXT, folder / _DEFAULT)
        fsync_path(folder)
    except OSError as error:
        raise _unusable(folder / _DEFAULT, error) from error


def _key(path: Path) -> SigningKey:
    from nacl.signing import SigningKey

    try:
        make_folder(path.parent, mode=0o700)
        _check_private(path.parent, os.stat(path.parent), "700")
        if not path.exists():
            _create(path)
        with open(path, "rb") as file:
            _check_private(path, os.fstat(file.fileno()), "600")
            text = file.read()
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        return SigningKey(bytes.fromhex(text.decode("ascii")))
    except ValueError as error:
        raise PluginError(
            f"{path} is not a signing key: expected 64 hexadecimal digits",
            f"restore it from a backup, or move it away to get a new one: "
            f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.broken')}",
        ) from error


def _create(path: Path) -> None:
    """Write a new seed, unless another process did so first: never replace a used key."""
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


def _unusable(path: Path, error: OSError) -> PluginError:
    return PluginError(
        f"cannot use the signing key {path}: {error.strerror}",
        f"make {path.parent} a folder that you own and can write to",
    )
