"""Packages made by hand, and a folder that uv takes them from instead of an index."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    files: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
) -> Path:
    """A pure wheel in `folder`.

    Args:
        name: as it stands in a wheel's file name: letters, digits, underscores.
        files: path in the archive -> text, such as `x.pth` or `{name}-{version}.data/data/y`;
            None: a module of that name with `VERSION` in it.
        requires: what it depends on, as PEP 508 writes it.
    """
    info = f"{name}-{version}.dist-info"
    depends = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    whole = {
        **({f"{name}.py": f"VERSION = {version!r}\n"} if files is None else files),
        f"{info}/METADATA": METADATA.format(name, version) + depends,
        f"{info}/WHEEL": WHEEL,
    }
    record = "".join(f"{path},{digest(text)},{len(text)}\n" for path, text in whole.items())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in {**whole, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return file


def sdist(folder: Path, name: str, version: str = "1.0", setup: str = "") -> Path:
    """A source distribution in `folder` whose `setup.py` runs `setup` before anything else."""
    files = {
        "PKG-INFO": METADATA.format(name, version),
        "setup.py": f"{setup}\nfrom setuptools import setup\nsetup(name={name!r})\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{path}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return file


def pin(file: Path) -> str:
    """The lock of one wheel or sdist; locks of several are added to each other."""
    name, version = file.name.removesuffix(".tar.gz").split("-")[:2]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{name}=={version} \\\n    --hash=sha256:{sha256}\n"


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, *, only: bool = True) -> None:
    """Have uv find packages in `folder`.

    Args:
        only: ask no index, so that even pyarrow must be in the folder; else the index as well.
    """
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))
    if only:
        monkeypatch.setenv("UV_NO_INDEX", "1")


def digest(text: str) -> str:
    """A RECORD's hash of a file."""
    raw = hashlib.sha256(text.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"
