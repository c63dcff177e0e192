"""The errors that this package raises, each with a message, a hint and an exit code.

    CasparianError
    ├── ConfigError              the configuration cannot be used
    ├── LedgerError              the database cannot be used
    │   └── LedgerLost           it was deleted, replaced or damaged: the daemon stops
    ├── DaemonRunning            another process holds the database's daemon lock
    ├── DaemonGone               the daemon does not run or does not answer
    ├── SourceError              a source root cannot be used
    ├── NotFound                 there is nothing by that name
    ├── PluginError              a plugin file cannot be published
    │   ├── PublishConflict      that version exists with other content
    │   └── PolicyRefused        its source has something that the policy forbids
    ├── AuthError                the publisher or key is not trusted for this
    ├── SandboxUnavailable       this machine lacks a sandbox that the configuration requires
    ├── ProtocolError            a message that is not valid
    ├── MachineRefused           a disk, a limit or a permission of this machine is in the way
    └── JobError                 an attempt of a job ended without output
        ├── PluginFailed         the plugin raised (retried)
        ├── PluginTimeout        the plugin exceeded its time limit (retried)
        ├── GuestDied            the guest process ended during the job (retried)
        │   └── GuestKilled      a signal of another program ended it (retried)
        ├── OutOfMemory          the plugin needed more memory than it could get (retried once)
        ├── EnvironmentFailed    the plugin's environment cannot be built (retried)
        ├── ArtifactRefused      the artifact, its signature or its key is not valid (permanent)
        ├── OutputRefused        the plugin's output cannot be stored (permanent)
        │   └── SinkConflict     the target exists and is not this output (permanent)
        ├── OnlyRejects          the file gave rejects but no row (permanent)
        ├── Superseded           the version's content is gone
        └── Unavailable          a fault of Casparian Flow or the machine (costs no attempt)
            └── SinkUnavailable      disk full, sink locked, output read-only

A message says what happened, and to which file, plugin or setting; `hint` says what to do or type
next. The command line prints both and exits with `exit_code`.
"""

from __future__ import annotations

import enum
import errno
import sys
from collections.abc import Mapping
from typing import ClassVar, NoReturn

_RETRY = "make sure the disk is mounted and has room, then the same command again"
_PERMISSION = "give yourself permission to read and write it, or choose another place"
_MACHINE_HINTS = {
    **dict.fromkeys(
        (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE,
         errno.ENOMEM, errno.EINTR), _RETRY,
    ),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _PERMISSION),
}  # fmt: skip
"""errno -> hint, for errors that a disk, a limit or a permission of the machine causes."""


class ExitCode(enum.IntEnum):
    """The exit codes of all programs here; `casparian --help` and docs/cli.md list them.

    Attributes:
        meaning: what the code means, as a phrase.
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
    PLUGIN = 65, "not a plugin, or a plugin version that exists with other content"
    NOT_FOUND = 66, "there is nothing by that name, or a source root cannot be read"
    BUG = 70, "a bug in casparian: run it with --debug and report the output"
    IO_ERROR = 74, "the database cannot be used, or a disk, a limit or a permission is in the way"
    DAEMON = 75, "another daemon runs, no daemon runs, or it does not answer in time"
    PROTOCOL = 76, "a message that is not from a Casparian Flow program"
    DENIED = 77, "the publisher or key is not trusted, or may not do this"
    CONFIG = 78, "the configuration, a rule, a sink or the sandbox cannot be used"
    INTERRUPTED = 130, "interrupted"


class CasparianError(Exception):
    """An error that a user can understand and fix.

    Args:
        message: what happened, and to which file, plugin or setting.
        hint: what to do or type next; may be empty.
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
    """The database was deleted, replaced or damaged while in use; the daemon must stop."""


class DaemonRunning(CasparianError):
    """Another process holds the daemon lock of this database."""

    exit_code = ExitCode.DAEMON


class DaemonGone(CasparianError):
    """The daemon does not run or did not answer in time."""

    exit_code = ExitCode.DAEMON


class SourceError(CasparianError):
    """A source root cannot be used."""

    exit_code = ExitCode.NOT_FOUND


class NotFound(CasparianError):
    """There is nothing by that name in the ledger."""

    exit_code = ExitCode.NOT_FOUND


class PluginError(CasparianError):
    """A plugin file cannot be published."""

    exit_code = ExitCode.PLUGIN


class PublishConflict(PluginError):
    """The version already exists with other content."""


class PolicyRefused(PluginError):
    """A plugin's source has something that the policy forbids."""


class AuthError(CasparianError):
    """The publisher or key is not trusted here, or not for this."""

    exit_code = ExitCode.DENIED


class SandboxUnavailable(CasparianError):
    """This machine lacks a sandbox that the configuration requires; no plugin was run."""

    exit_code = ExitCode.CONFIG


class ProtocolError(CasparianError):
    """A message that is malformed, or not of this protocol."""

    exit_code = ExitCode.PROTOCOL


class MachineRefused(CasparianError):
    """A disk, a limit or a permission of this machine made an operation fail."""

    exit_code = ExitCode.IO_ERROR


class JobError(CasparianError):
    """An attempt of a job ended without output; `retryable`: whether another may succeed."""

    retryable: ClassVar[bool] = True


class PluginFailed(JobError):
    """The plugin raised an exception."""


class PluginTimeout(JobError):
    """The plugin exceeded its time limit and was killed."""


class GuestDied(JobError):
    """The guest process ended, or sent an invalid message, while it ran the job."""


class GuestKilled(GuestDied):
    """A signal that the plugin did not cause ended the guest."""


class OutOfMemory(JobError):
    """The plugin needed more memory than its limit, or than the machine had."""


class EnvironmentFailed(JobError):
    """The plugin's locked environment cannot be built."""


class ArtifactRefused(JobError):
    """The artifact is not what was signed, or it or its key was revoked; it was not run."""

    retryable = False


class OutputRefused(JobError):
    """The plugin's output cannot be stored; the same file would fail again."""

    retryable = False


class SinkConflict(OutputRefused):
    """The target exists and is not the output of this job; it was left untouched."""


class OnlyRejects(JobError):
    """The file gave rejects but no row; the same file would fail again."""

    retryable = False


class Held(JobError):
    """The version does not fit the table's contract, and waits until a person has decided."""

    retryable = False


class Superseded(JobError):
    """The content of the job's version is gone, since its file was changed or deleted."""

    retryable = False


class Unavailable(JobError):
    """A fault of Casparian Flow or the machine; the job waits, and no attempt is counted."""


class SinkUnavailable(Unavailable):
    """The sink cannot be written now: it is full, locked, unreachable or read-only."""


def first_error(error: BaseException) -> BaseException:
    """The error to report: of an exception group the first CasparianError, else the first one.

    An OSError of a disk, a limit or a permission becomes a MachineRefused.
    """
    if isinstance(error, BaseExceptionGroup):
        causes = [first_error(cause) for cause in error.exceptions]
        return next((cause for cause in causes if isinstance(cause, CasparianError)), causes[0])
    if isinstance(error, OSError) and (hint := _MACHINE_HINTS.get(error.errno or 0)):
        what = f"{error.strerror}: {error.filename or 'this machine'}"
        return MachineRefused(what, hint).with_traceback(error.__traceback__)
    return error


def leave(error: BaseException) -> NoReturn:
    """Print an error and its hint, and exit with its code.

    Raises:
        BaseException: `error` itself, if it is a bug.
    """
    cause = first_error(error)
    if not isinstance(cause, CasparianError):
        raise error
    hint = f"\n  try: {cause.hint}" if cause.hint else ""
    print(f"error: {cause.message}{hint}", file=sys.stderr)  # noqa: T201
    sys.exit(cause.exit_code)


# Numbers in messages.


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 job`, `3,014 jobs`.

    Args:
        plural: the plural; default: the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def tallied(amounts: Mapping[str, int]) -> str:
    """`3,014 rows, 1 job`.

    Args:
        amounts: plural noun -> how many.
    """
    return ", ".join(counted(number, noun.removesuffix("s")) for noun, number in amounts.items())
