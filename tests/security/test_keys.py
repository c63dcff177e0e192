"""The key files of a person: private, made once, kept when another takes their place."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from casparian_flow.errors import PluginError
from casparian_flow.security.keys import kept_keys, local_key, next_key, promote
from casparian_flow.security.signing import key_id

KEY = SigningKey(bytes(range(32)))


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


def test_a_promoted_key_signs_and_the_earlier_one_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    old, new = local_key(folder), next_key(folder)
    assert next_key(folder) == new
    promote(folder)
    assert local_key(folder) == new
    assert kept_keys(folder) == [old]
    kept = folder / f"{key_id(old.verify_key.encode())}.key"
    assert os.stat(kept).st_mode & 0o777 == 0o600
    third = next_key(folder)
    assert third not in (old, new)
    promote(folder)
    assert local_key(folder) == third
    assert {key.encode() for key in kept_keys(folder)} == {old.encode(), new.encode()}


def test_a_promotion_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    old, new = local_key(folder), next_key(folder)
    os.link(folder / "default.key", folder / f"{key_id(old.verify_key.encode())}.key")
    promote(folder)
    assert local_key(folder) == new
    assert kept_keys(folder) == [old]


def test_a_promotion_without_a_next_key_changes_nothing(tmp_path: Path) -> None:
    key = local_key(tmp_path / "keys")
    with pytest.raises(PluginError, match="cannot use the signing key"):
        promote(tmp_path / "keys")
    assert local_key(tmp_path / "keys") == key


def _folder(tmp_path: Path, key: bytes) -> Path:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    (folder / "default.key").write_bytes(key)
    (folder / "default.key").chmod(0o600)
    return folder
