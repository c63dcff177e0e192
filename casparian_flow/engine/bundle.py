"""The folder that a guest imports us from: the guest's side, the sdk, the sandbox, and no more."""

from __future__ import annotations

import compileall
import hashlib
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from casparian_flow.atomic import make_folder

BUNDLED = (
    "__init__.py",
    "sdk.py",
    "engine/__init__.py",
    "engine/attempt.py",
    "engine/frames.py",
    "engine/guest.py",
    "security/__init__.py",
    "security/kernel.py",
    "security/landlock.py",
    "security/namespaces.py",
    "security/sandbox.py",
    "security/seccomp.py",
)


def bundle(cache: Path) -> Path:
    """The folder that holds what a guest imports from us, and nothing else; made once.

    Args:
        cache: a folder that may be deleted at any time, such as `config.cache_folder()`.
    """
    package = resources.files("casparian_flow")
    files = {name: package.joinpath(name).read_bytes() for name in BUNDLED}
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    folder = cache / "guest" / digest
    if folder.is_dir():
        return folder
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest[:8]}.", dir=folder.parent))
    try:
        for name, content in files.items():
            file = temporary / "casparian_flow" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(0o444)
        # The guest cannot write byte code; each would compile all of this anew.
        compileall.compile_dir(temporary, stripdir=temporary, prependdir=folder, quiet=2)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
