"""Every error this package raises on purpose, and what to do about it.

    CasparianError
    ├── ConfigError              the configuration cannot be used
    ├── LedgerError              the database cannot be used
    │   └── LedgerLost           it is gone, was replaced under us, or is damaged: we stop
    ├── DaemonRunning            another process holds the database's daemon lock
    ├── DaemonGone               the daemon we waited for does not answer
    ├── SourceError              a source root cannot be used
    ├── NotFound                 nothing by that name
    ├── PluginError              a plugin file cannot be published
    │   ├── PublishConflict      that version exists with other bytes
    │   └── PolicyRefused        the Gatekeeper found something in its source
    ├── AuthError                who publishes is not known, or may not
    ├── SandboxUnavailable       this machine cannot hold plugins as the configuration requires
    ├── ProtocolError            a message that is not ours
    ├── MachineRefused           a disk, a limit or a right of this machine refused
    └── JobError                 an attempt of a job ended without output
        ├── PluginFailed         the plugin raised (retried)
        ├── PluginTimeout        the plugin outran its wall clock (retried)
        ├── GuestDied            the guest process ended under the job (retried)
        │   └── GuestKilled      a signal from elsewhere ended it (retried)
        ├── OutOfMemory          it needed more memory than there was (retried once)
        ├── EnvironmentFailed    the plugin's environment cannot be built (retried)
        ├── ArtifactRefused      the artifact, its signature or its key is not in order (permanent)
        ├── OutputRefused        what it published cannot be stored (permanent)
        │   └── SinkConflict     the target is there and is not ours (permanent)
        ├── OnlyRejects          nothing but rejects came of the file (permanent)
        ├── Superseded           the version's bytes are gone or changed
        └── Unavailable          a fault of ours or of the machine (costs no attempt)
            └── SinkUnavailable      disk full, sink locked, output read-only

An error is what happened, to what, and in `hint` what to type next. The command line prints
both and exits with `exit_code`: one of `ExitCode`.
"""

from __future__ import annotations

import enum
import errno
import sys
from collections.abc import Mapping
from typing import ClassVar, NoReturn

_AGAIN = "make sure the disk is mounted and has room, then the same command again"
_RIGHTS = "give yourself permission to read and write it, or choose another place"
_OF_THE_MACHINE = {
    **dict.fromkeys(
        (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE,
         errno.ENOMEM, errno.EINTR), _AGAIN,
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _RIGHTS),
}  # fmt: skip
"""What a disk, a limit or a right says, whatever the program: no bug of ours. And what to do."""


class ExitCode(enum.IntEnum):
    """What the programs of this package end with; `casparian --help` and docs/cli.md list them.

    Attributes:
        meaning: what it says, in words.
    """

    meaning: str

    def __new__(cls, number: int, meaning: str) -> ExitCode:
        code = int.__new__(cls, number)
        code._value_ = number
        code.meaning = meaning
        return code

    DONE = 0, "success"
    FAILED = 1, "a job failed, a check found a problem, or the request cannot be done"
    USAGE = 2, "wrong usage"
    PARTIAL = 3, "partly done: a scan could not read some files, or did not trust what it saw"
    PLUGIN = 65, "not a plugin, or a plugin version that exists with other bytes"
    NOT_FOUND = 66, "there is nothing by that name, or a source root cannot be read"
    BUG = 70, "a bug in casparian: run it with --debug and report the output"
    IO_ERROR = 74, "the database cannot be used, or a disk, a limit or a permission is in the way"
    DAEMON = 75, "another daemon runs, no daemon runs, or it does not answer in time"
    PROTOCOL = 76, "a message that is not from a Casparian Flow program"
    DENIED = 77, "the publisher or key is not trusted, or may not do this"
    CONFIG = 78, "the configuration, a rule, a sink or the sandbox cannot be used"
    INTERRUPTED = 130, "interrupted"


class CasparianError(Exception):
    """Something went wrong that a person can understand and mend.

    Args:
        message: what happened, and to which file, plugin or setting.
        hint: what to do or type next; empty where there is nothing better to say.
    """

    exit_code: int = ExitCode.FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(CasparianError):
    """The configuration cannot be used."""

    exit_code = ExitCode.CONFIG


class LedgerError(CasparianError):
    """The database cannot be used as the ledger."""

    exit_code = ExitCode.IO_ERROR


class LedgerLost(LedgerError):
    """The database was deleted, replaced or damaged under us; to go on would write into nothing."""


class DaemonRunning(CasparianError):
    """Another process holds the daemon lock of this database."""

    exit_code = ExitCode.DAEMON


class DaemonGone(CasparianError):
    """The daemon did not answer in time."""

    exit_code = ExitCode.DAEMON


class SourceError(CasparianError):
    """A source root cannot be used."""

    exit_code = ExitCode.NOT_FOUND


class NotFound(CasparianError):
    """Nothing in the ledger has that name."""

    exit_code = ExitCode.NOT_FOUND


class PluginError(CasparianError):
    """A plugin file cannot be published."""

    exit_code = ExitCode.PLUGIN


class PublishConflict(PluginError):
    """The version exists already with other bytes."""


class PolicyRefused(PluginError):
    """The Gatekeeper found something in a plugin's source that the policy forbids."""


class AuthError(CasparianError):
    """Who publishes, trusts or revokes is not known here, or may not do it."""

    exit_code = ExitCode.DENIED


class SandboxUnavailable(CasparianError):
    """This machine cannot give the sandbox that the configuration requires; nothing was run."""

    exit_code = ExitCode.CONFIG


class ProtocolError(CasparianError):
    """A message that is not one of ours."""

    exit_code = ExitCode.PROTOCOL


class MachineRefused(CasparianError):
    """A disk, a limit or a right refused, where nothing else knew what to do about it."""

    exit_code = ExitCode.IO_ERROR


class JobError(CasparianError):
    """An attempt of a job ended without output; `retryable` says whether another may succeed."""

    retryable: ClassVar[bool] = True


class PluginFailed(JobError):
    """The plugin raised an exception."""


class PluginTimeout(JobError):
    """The plugin outran its time limit and was killed."""


class GuestDied(JobError):
    """The guest process ended, or broke the protocol, while it ran the job."""


class GuestKilled(GuestDied):
    """A signal that the plugin did not cause ended the guest; who sent it is not known."""


class OutOfMemory(JobError):
    """The plugin needed more memory than its guest may have, or than the machine had."""


class EnvironmentFailed(JobError):
    """The plugin's locked environment cannot be built here and now."""


class ArtifactRefused(JobError):
    """The artifact is not what was signed, or its key or itself was revoked; it was not run."""

    retryable = False


class OutputRefused(JobError):
    """What the plugin published cannot be stored; the same bytes would fail again."""

    retryable = False


class SinkConflict(OutputRefused):
    """The target exists and is not the output of this job; it was left untouched."""


class OnlyRejects(JobError):
    """Nothing but rejects came of the file; the same bytes would give the same."""

    retryable = False


class Superseded(JobError):
    """The bytes of the job's version are gone or have changed."""

    retryable = False


class Unavailable(JobError):
    """A fault of ours or of the machine; the job waits and loses no attempt."""


class SinkUnavailable(Unavailable):
    """The sink cannot take output now: full, locked, unreachable or read-only."""


def first_error(error: BaseException) -> BaseException:
    """What a program ended with: of a group of tasks the first error that is one of ours, else the
    first. What a disk or a limit says is one of ours, too."""
    if isinstance(error, BaseExceptionGroup):
        causes = [first_error(cause) for cause in error.exceptions]
        return next((cause for cause in causes if isinstance(cause, CasparianError)), causes[0])
    if isinstance(error, OSError) and (hint := _OF_THE_MACHINE.get(error.errno or 0)):
        what = f"{error.strerror}: {error.filename or 'this machine'}"
        return MachineRefused(what, hint).with_traceback(error.__traceback__)
    return error


def leave(error: BaseException) -> NoReturn:
    """End a daemon of its own: say what went wrong and what to type next, and exit with its code.

    Raises:
        BaseException: `error` itself, where it is a bug.
    """
    cause = first_error(error)
    if not isinstance(cause, CasparianError):
        raise error
    hint = f"\n  try: {cause.hint}" if cause.hint else ""
    print(f"error: {cause.message}{hint}", file=sys.stderr)  # noqa: T201
    sys.exit(cause.exit_code)


# Numbers in sentences.


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 job`, `3,014 jobs`.

    Args:
        plural: where it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def tallied(amounts: Mapping[str, int]) -> str:
    """`3,014 rows, 1 job`.

    Args:
        amounts: plural noun -> how many.
    """
    return ", ".join(counted(number, noun.removesuffix("s")) for noun, number in amounts.items())
