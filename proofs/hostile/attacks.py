"""What a plugin might try that no reader of its source can know: bodies that succeed by returning.

Each is run as the body of `execute`; what ends in an exception did no harm that way, and what the
host can see of harm is looked at besides. `T` has the targets: paths, ports and process ids.
"""

from __future__ import annotations

from typing import NamedTuple


class Attack(NamedTuple):
    """One thing to try."""

    row: int
    """Of the corpus that these were taken from; 0 for those added here."""
    name: str
    code: str


def _attacks(text: str) -> list[Attack]:
    found = []
    for block in text.strip().split("\n#: ")[0:]:
        head, _, code = block.removeprefix("#: ").partition("\n")
        row, _, name = head.partition(" ")
        found.append(Attack(int(row), name.strip(), code.strip("\n")))
    return found


ATTACKS = _attacks(
    """
#: 23 format-field
import logging, string
string.Formatter().get_field("0.os.listdir", (logging,), {})[0]("/etc")
#: 24 type-hints
import typing
class X: x: "open(T['secret']).read()"
typing.get_type_hints(X, {"T": T, "open": open})
#: 25 runstring
import numpy as np
np.testing.runstring("open(T['secret']).read()", {"T": T})
#: 25 resolve
import logging.config
logging.config.BaseConfigurator({}).resolve("os.listdir")("/etc")
#: 26 FileIO
import io
io.FileIO(T["secret"]).read()
#: 26 input_stream
pa.input_stream(T["secret"]).read()
#: 26 read_fwf
import pandas as pd
pd.read_fwf(T["secret"])
#: 26 dataset
import pyarrow.dataset
pyarrow.dataset.dataset(T["secret"], format="csv").to_table()
#: 27 read_csv
import pandas as pd
pd.read_csv(T["secret"])
#: 27 fromfile
import numpy as np
np.fromfile(T["secret"], dtype="u1")
#: 27 memory_map
pa.memory_map(T["secret"]).read()
#: 27 local-filesystem
import pyarrow.fs
pyarrow.fs.LocalFileSystem().open_input_file(T["secret"]).read()
#: 27 raw-open
import ctypes
if ctypes.CDLL(None).open(T["secret"].encode(), 0) < 0: raise OSError("refused")
#: 28 list-home
os.listdir(os.path.dirname(T["secret"]))
#: 28 passwd
open("/etc/passwd").read()
#: 28 stat
os.stat(T["secret"])
#: 28 access
if not os.access(T["secret"], os.F_OK): raise OSError("refused")
#: 28 readlink
os.readlink("/proc/self/exe")
#: 29 environ
open(f"/proc/{T['host']}/environ", "rb").read()
#: 30 mem
open(f"/proc/{T['host']}/mem", "rb")
#: 30 fds
os.listdir(f"/proc/{T['host']}/fd")
#: 30 pidfd-getfd
fd = os.pidfd_open(T["host"])
if syscall(438, fd, 0, 0) < 0: raise OSError("refused")
#: 31 vm-readv
import ctypes
place = ctypes.byref(ctypes.create_string_buffer(16))
if syscall(310, T["host"], place, 1, place, 1, 0) < 0: raise OSError
#: 31 ptrace
if syscall(101, 16, T["host"], 0, 0) < 0: raise OSError
#: 31 process-madvise
if syscall(440, 0, 0, 0, 0, 0) < 0: raise OSError
#: 32 own-environment
ours = ("HOSTPW", "AZURE_", "CASPARIAN_")
if not any(name.startswith(ours) for name in os.environ): raise OSError
#: 33 descriptors
stray = []
for fd in range(3, 1024):
    try: info = os.fstat(fd)
    except OSError: continue
    if fd != __import__("__main__").WIRE.fileno(): stray.append(fd)
if not stray: raise OSError("none")
#: 34 tcp
socket.create_connection(("127.0.0.1", T["tcp"]), 2)
#: 34 tcp6
socket.socket(socket.AF_INET6).connect(("::1", T["tcp"]))
#: 35 udp
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", T["udp"]))
#: 36 listen
socket.create_server(("127.0.0.1", 0))
#: 36 netlink
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
#: 37 unix
socket.socket(socket.AF_UNIX).connect(T["unix"])
#: 37 abstract
socket.socket(socket.AF_UNIX).connect("\\0" + T["abstract"])
#: 37 datagram-from-a-pair
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
a.sendto(b"x", T["unix_dgram"])
#: 37 sendto-from-a-pair
a, b = socket.socketpair()
a.sendto(b"x", T["unix"])
#: 38 url
import pandas as pd
pd.read_csv(f"http://127.0.0.1:{T['tcp']}/x")
#: 38 s3
import pyarrow.fs
pyarrow.fs.S3FileSystem(
    endpoint_override=f"127.0.0.1:{T['tcp']}", scheme="http", access_key="a", secret_key="b",
    connect_timeout=1, request_timeout=1,
).get_file_info("b/k")
#: 39 socket-handler
import logging.handlers
logging.handlers.SocketHandler("127.0.0.1", T["tcp"]).makeSocket()
#: 39 getnode
import subprocess
subprocess.run(["ip", "link"], check=True)
#: 40 io-uring
import ctypes
if syscall(425, 8, ctypes.create_string_buffer(120)) < 0: raise OSError
#: 41 write-home
open(os.path.join(os.path.dirname(T["secret"]), "planted"), "w")
#: 41 write-tmp
open("/tmp/casparian-planted", "w")
#: 41 write-shm
open("/dev/shm/casparian-planted", "w")
#: 41 write-input
open(file_path, "a")
#: 41 write-venv
open(os.path.join(os.path.dirname(pa.__file__), "..", "zzz.pth"), "w")
#: 41 write-byte-code
import json
open(json.__cached__, "ab")
#: 42 mkdir
os.mkdir("/tmp/casparian-planted-folder")
#: 42 mkfifo
os.mkfifo(os.path.join(os.path.dirname(file_path), "fifo"))
#: 43 truncate
os.truncate(T["secret"], 0)
#: 43 truncate-by-reading
os.open(file_path, os.O_RDONLY | os.O_TRUNC)
#: 43 unlink
os.unlink(T["secret"])
#: 43 unlink-input
os.unlink(file_path)
#: 43 rename
os.rename(file_path, file_path + ".moved")
#: 43 symlink
os.symlink(T["secret"], os.path.join(os.environ["TMPDIR"], "s"))
open(os.path.join(os.environ["TMPDIR"], "s")).read()
#: 43 hardlink
os.link(T["secret"], os.path.join(os.environ["TMPDIR"], "h"))
#: 44 chmod
os.chmod(T["secret"], 0o666)
#: 44 chmod-input
os.chmod(file_path, 0o666)
#: 44 fchmod-input
os.fchmod(os.open(file_path, os.O_RDONLY), 0o666)
#: 44 chown
os.chown(T["secret"], os.getuid(), os.getgid())
#: 44 utime
os.utime(T["secret"], (1, 1))
#: 44 utime-input
os.utime(file_path, (1, 1))
#: 44 setxattr
os.setxattr(file_path, "user.x", b"x")
#: 0 inode-flags
import fcntl
fcntl.ioctl(os.open(file_path, os.O_RDONLY), 0x40086602, (16).to_bytes(8, "little"))
#: 45 system
if os.system("true") != 0: raise OSError
#: 45 subprocess
import subprocess
subprocess.run(["/bin/true"])
#: 45 posix-spawn
os.posix_spawn("/bin/true", ["true"], {})
#: 45 exec
os.execv("/bin/true", ["true"])
#: 45 exec-memfd
fd = os.memfd_create("x")
#: 45 multiprocessing
import multiprocessing
multiprocessing.get_context("fork").Process(target=print).start()
#: 46 fork
if syscall(57) < 0: raise OSError
#: 46 vfork-by-clone
if syscall(56, 17, 0, 0, 0, 0) < 0: raise OSError
#: 46 clone3
import ctypes
if syscall(435, ctypes.create_string_buffer(88), 88) < 0: raise OSError
#: 48 kill-host
os.kill(T["host"], 10)
#: 48 kill-all
os.kill(-1, 10)
#: 48 kill-group
os.kill(0, 10)
#: 48 tgkill-host
if syscall(234, T["host"], T["host"], 10) < 0: raise OSError
#: 48 tkill-host
if syscall(200, T["host"], 10) < 0: raise OSError
#: 48 sigqueue
if syscall(129, T["host"], 10, 0) < 0: raise OSError
#: 48 pidfd-signal
import signal
signal.pidfd_send_signal(os.pidfd_open(T["host"]), 10)
#: 0 sigio-to-the-host
import fcntl
fcntl.fcntl(__import__("__main__").WIRE, fcntl.F_SETOWN, T["host"])
#: 0 leave-the-session
os.setsid()
#: 0 outlive-the-host
if syscall(157, 1, 0, 0, 0, 0) < 0: raise OSError
#: 49 user-namespace
if syscall(272, 0x10000000) < 0: raise OSError
#: 49 set-namespace
if syscall(308, 0, 0) < 0: raise OSError
#: 49 own-limit
import resource
resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
#: 49 hosts-limit
import resource
resource.prlimit(T["host"], resource.RLIMIT_NOFILE, (3, 3))
#: 49 priority
os.setpriority(os.PRIO_PROCESS, T["host"], 19)
#: 49 affinity
os.sched_setaffinity(T["host"], {0})
#: 49 setuid
os.setuid(0)
os.setuid(12345)
#: 49 mount
if syscall(165, b"none", b"/", b"tmpfs", 0, 0) < 0: raise OSError
#: 49 unmount
if syscall(166, os.environ["HOME"].encode() + b"/in", 2) < 0: raise OSError
#: 49 chroot
os.chroot("/")
#: 49 keyctl
if syscall(250, 0, -3, 1) < 0: raise OSError
#: 49 bpf
if syscall(321, 0, 0, 0) < 0: raise OSError
#: 49 perf
if syscall(298, 0, 0, -1, -1, 0) < 0: raise OSError
#: 49 userfaultfd
if syscall(323, 0) < 0: raise OSError
#: 49 handle
if syscall(304, -100, 0, 0) < 0: raise OSError
#: 0 x32-calls
if syscall(0x40000000 + 57) < 0: raise OSError
#: 0 a-second-filter
if syscall(317, 0, 0, 0) < 0: raise OSError
#: 50 shmget
if syscall(29, 0, 1 << 20, 0o1600) < 0: raise OSError
#: 50 message-queue
if syscall(240, b"q", 0o101, 0o600, 0) < 0: raise OSError
#: 50 memfd
if syscall(319, b"m", 0) < 0: raise OSError
#: 50 bytearrays
kept = [bytearray(100 << 20) for _ in range(60)]
#: 50 numpy
import numpy as np
np.ones(6 << 30, dtype="u1")
#: 50 shared-anonymous
import mmap
kept = [mmap.mmap(-1, 500 << 20) for _ in range(12)]
#: 51 one-file
open(os.path.join(os.environ["TMPDIR"], "f"), "wb").write(b"x")
#: 0 locks-of-open-files
import fcntl, struct
fcntl.fcntl(os.open(file_path, os.O_RDONLY), 37, struct.pack("hhqqi", 0, 0, 0, 1, 0))
#: 0 waiting-locks-of-open-files
import fcntl, struct
fcntl.fcntl(os.open(file_path, os.O_RDONLY), 38, struct.pack("hhqqi", 0, 0, 0, 1, 0))
#: 0 pipe-size
import fcntl
fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)
#: 0 posix-timers
import ctypes
if syscall(222, 1, 0, ctypes.create_string_buffer(8)) < 0: raise OSError
#: 0 inotify
if syscall(294, 0) < 0: raise OSError
#: 0 system-v-queue
if syscall(68, 0, 0o1600) < 0: raise OSError
#: 0 semaphores
if syscall(64, 0, 1, 0o1600) < 0: raise OSError
#: 0 queued-signals
if syscall(297, os.getpid(), os.getpid(), 40, 0) < 0: raise OSError
#: 67 pass-a-descriptor
wire = __import__("__main__").WIRE
socket.send_fds(wire, [b"x"], [0])
#: 67 out-of-band
__import__("__main__").WIRE.send(b"x", socket.MSG_OOB)
"""
)
