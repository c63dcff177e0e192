"""Which filesystem a path lies on: where others write unheard, and where no database should lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SHARED = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "coda", "gfs2", "glusterfs",
    "gpfs", "lustre", "ncpfs", "ocfs2", "vboxsf",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse",
}  # fmt: skip
_MEMORY = {"tmpfs", "ramfs"}

_MOUNTS = Path("/proc/self/mountinfo")


def kind(path: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the filesystem that a path lies on, as mount(8) names it; empty where the
    kernel does not say (not Linux)."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    here, found, deepest = os.path.realpath(path), "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        # Blanks and backslashes in a path are written in octal.
        mounted = re.sub(r"\\([0-7]{3})", lambda c: chr(int(c[1], 8)), fields.split()[4])
        inside = here == mounted or here.startswith(f"{mounted.rstrip('/')}/")
        if inside and len(mounted) >= deepest:  # the last of those at one place is the one seen
            found, deepest = rest.split()[0], len(mounted)
    return found


def unheard(path: Path) -> str:
    """The type of a filesystem on which somebody may write without the kernel's telling us: one of
    the network's, or one made by a program. Empty for a local one."""
    found = kind(path)
    return found if found in _SHARED or found.startswith("fuse") else ""


def doubt(path: Path) -> str:
    """Why a database at that path is in danger, in words; empty where it is not."""
    found = kind(path)
    if found in _SHARED:
        return (
            f"the database {path} lies on a network filesystem ({found}): locks that keep writers "
            "apart cannot be trusted there, and a write-ahead log is for one machine"
        )
    if found in _MEMORY:
        return f"the database {path} lies in memory ({found}): it is gone with the next restart"
    return ""
