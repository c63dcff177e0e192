"""Power cuts without a plug: a filesystem in a file that forgets what was not made durable.

ext4's shutdown ioctl (NOLOGFLUSH) stops a mounted filesystem as it is: nothing more reaches its
device. Unmounting throws the memory away, mounting replays the journal, and what is there then is
what a disk would hold after the power went. With database and sink on one filesystem, the
database's fsync commits the journal for both and hides an fsync that the sink forgot; so both are
tried on one, and on two.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proofs.crash.matrix import Matrix
from proofs.crash.scene import Act, Ground
from tests import disks
from tests.eventually import wait_until

SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN."""
NOLOGFLUSH = 2
IMAGE_BYTES = 24 << 20
MKFS = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard"]
RANKS = ["QUEUED", "RUNNING", "COMMITTING", "COMPLETED"]


def why_not() -> str:
    """Why power cannot be cut here; empty where it can."""
    if os.getuid() != 0:
        return "power cuts need root: they mount filesystems"
    if not shutil.which("mkfs.ext4"):
        return "power cuts need mkfs.ext4"
    with tempfile.TemporaryDirectory() as folder:
        ground = LoopGround(Path(folder), filesystems=1)
        try:
            ground.prepare()
            ground.cut()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"power cuts need loop mounts of ext4, and its shutdown: {error}"
        finally:
            ground.close()
    return ""


@dataclass
class LoopGround(Ground):
    """A ground on one or two loop-mounted filesystems."""

    filesystems: int = 1
    _mounted: bool = False

    def _mounts(self) -> dict[Path, Path]:
        """Image -> where it is mounted."""
        places = [self.home, self.sink] if self.filesystems == 2 else [self.home.parent]
        return {self.scratch / f"{place.name}.img": place for place in places}

    def prepare(self) -> None:
        """See `Ground.prepare`."""
        for image, place in self._mounts().items():
            place.mkdir(parents=True)
            disks.make(image, IMAGE_BYTES, *MKFS)
        self._mount()
        for folder in (self.home, self.sink, self.inbox):
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str) -> None:
        """See `Ground.save`."""
        self.close()
        self._saved(name).mkdir(parents=True)
        for image in self._mounts():
            _do("cp", "--sparse=always", image, self._saved(name))
        self._mount()

    def restore(self, name: str) -> None:
        """See `Ground.restore`."""
        self.close()
        for image in self._mounts():
            _do("cp", "--sparse=always", self._saved(name) / image.name, image)
        self._mount()

    def cut(self) -> None:
        """Let nothing more reach the disks."""
        for place in self._mounts().values():
            descriptor = os.open(place, os.O_RDONLY)
            try:
                fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
            finally:
                os.close(descriptor)

    def power_on(self) -> None:
        """Forget what was in memory, and look at the disks anew."""
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmount; what was killed may need a moment to let go."""
        for image, place in self._mounts().items() if self._mounted else ():
            # Asked of umount itself: a filesystem without power does not say that it is mounted.
            wait_until(partial(_unmounted, place))
            # A dying guest sees it in a mount namespace of its own: mounted again before that is
            # gone, it would be the same filesystem, still without power.
            wait_until(partial(_detached, image))
        self._mounted = False

    def _mount(self) -> None:
        for image, place in self._mounts().items():
            disks.mount(place, "-o", "loop,noatime", image)
        self._mounted = True


class PowerMatrix(Matrix):
    """At its crash point the command loses its filesystems, and then its life."""

    ground: LoopGround

    def _crash(self, act: Act, hit: str, found: list[str]) -> bool:
        told: dict[str, set[tuple[object, ...]]] = {}

        def cut() -> None:
            told.update(self._facts())
            self.ground.cut()

        if not self._came_there(act, self._run(act, at=hit, then=cut), found):
            return False
        self.ground.power_on()
        kept = self._facts()
        found += [
            f"acknowledged and lost: {what} {fact}"
            for what, facts in told.items()
            for fact in sorted(facts - kept.get(what, set()), key=repr)
        ]
        return True

    def _facts(self) -> dict[str, set[tuple[object, ...]]]:
        """What the ledger tells whoever asks; a copy is asked, so that its recovery stays ours."""
        database = self.ground.home / "casparian_flow.sqlite3"
        with tempfile.TemporaryDirectory() as folder:
            for file in (database, database.with_name(f"{database.name}-wal")):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(file, folder)
            copy = Path(folder) / database.name
            if not copy.exists():
                return {}
            with contextlib.closing(sqlite3.connect(copy)) as connection:
                return _facts(connection)


def _facts(connection: sqlite3.Connection) -> dict[str, set[tuple[object, ...]]]:
    """Rows that never change again, and how far each job has come at the least."""
    queries = {
        "audit row": "SELECT seq, hash FROM cf_audit",
        "version": "SELECT id, content_hash FROM cf_file_version",
        "attempt": "SELECT job_id, fence FROM cf_attempt",
        "output": "SELECT output_key, target FROM cf_output WHERE state = 'PUBLISHED'",
    }
    try:
        facts = {what: set(connection.execute(query)) for what, query in queries.items()}
        jobs = connection.execute("SELECT id, status FROM cf_processing_queue").fetchall()
    except sqlite3.OperationalError:  # its tables are not there yet
        return {}
    facts["job"] = {(i, s) for i, status in jobs for s in RANKS[: RANKS.index(status) + 1]}
    return facts


def _unmounted(place: Path) -> bool:
    return _run("umount", place).returncode == 0


def _detached(image: Path) -> bool:
    return not _run("losetup", "-j", image).stdout


def _do(*words: str | Path) -> None:
    _run(*words).check_returncode()


def _run(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, capture_output=True, check=False)
