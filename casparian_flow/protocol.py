"""The wire: every message between Sentinel, Workers and the command line, and how it is encoded.

Pure: imports no zmq. A message is two frames, the protocol version and a MessagePack body whose
tag names the type. Table data never travels here: a Worker stages it on disk and sends a receipt.
The ledger is the truth, so every message may be lost, repeated or late without harm.

    Worker -> Sentinel   Hello, Ready, Fetch, Conclude, Heartbeat, Goodbye
    Sentinel -> Worker   Unknown, Welcome, Assign, Granted, Artifact, Drain
    client -> Sentinel   Deploy, Ring, Ask
    Sentinel -> client   Reply

Who may send anything at all was settled before, in ZeroMQ's own handshake (`engine.wire`).
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

import msgspec

from casparian_flow.config import GuestSettings
from casparian_flow.errors import ProtocolError

VERSION = b"CF1"
FRAME_LIMIT = 64 << 20
"""Bytes; a larger frame closes the connection. An artifact is the largest thing we send."""


MODES = ("append", "replace", "error")
"""What publishing does with what a topic's sink has already (docs/sinks.md)."""

Pair = tuple[int, int]
"""A job's id and the fence it is held under: one attempt."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; also what the worker's side passes between its own modules."""


class OutputPlan(Record, frozen=True):
    """One place an attempt may write to: a topic and one of its sinks."""

    topic: str
    uri: str
    """The sink, as configured: part of the output key."""
    location: str
    """The sink with its path made absolute; what the worker opens."""
    mode: str
    """One of `MODES`."""
    output_key: str
    slot: str
    """What the outputs of all versions of the location have in common here: in mode `replace` the
    one with the greatest (ordinal, job id) takes the place of the others."""
    ordinal: int
    """Of the version: 1 for the first content of its location."""
    split_bytes: int = 0
    """Size of a part of a large output, where the sink keeps files; 0: never split."""
    facts: dict[str, str] = {}
    """What the output key is made of, in words: the sink keeps them beside the rows, so that who
    has lost the ledger knows what is there."""


class Assignment(Record, frozen=True):
    """One attempt of one job: everything a worker needs, so that it never reads the ledger."""

    job_id: int
    fence: int
    attempt: str
    """A name no other attempt of any job has; staged files carry it."""
    plugin_id: int
    plugin_version: str
    version_id: int
    source: str
    path: bytes
    """Absolute path of the location's file, as bytes."""
    rel_path: str
    content_hash: str
    size_bytes: int
    timeout_seconds: float
    outputs: list[OutputPlan]
    snapshot: str = ""
    """Absolute path of the version's bytes in the snapshot store; empty where it has none."""
    may_be_empty: list[str] = []
    """Topics of data that the file may give no row while it gives rejects."""


class StagedOutput(Record, frozen=True):
    """An output that is sealed on disk and can be published by whoever reads this."""

    topic: str
    uri: str
    location: str
    mode: str
    output_key: str
    slot: str
    ordinal: int
    job_id: int
    stage: str
    """Absolute path of the staged file, or of the folder with its parts."""
    rows: int
    size_bytes: int
    digest: str
    """SHA-256 of the staged file's bytes, hexadecimal; of a folder, over those of its parts."""


class Published(Record, frozen=True):
    """An output that readers can see."""

    target: str
    """Where it is: the absolute path of the file or of the folder with its parts, or the
    database's path and the table."""
    rows: int
    digest: str
    """As of a staged output: of the target where that is files, else of what was staged."""
    adopted: bool
    """True where an earlier attempt had published it already."""
    retracted: bool = False
    """True where a person has taken it back since: it is kept, and nobody sees it."""


class Evidence(Record, frozen=True):
    """What the host saw of an attempt, besides what the plugin printed."""

    fault: str = ""
    """The class of the error (`casparian_flow.errors`); empty where it ended well."""
    signal: str = ""
    """What ended the guest, such as `SIGSEGV`; empty where no signal did."""
    exit_code: int | None = None
    """Of the guest; None where it lives on or a signal ended it."""
    batches: int = 0
    rows: int = 0
    """What had come of its output when it ended."""
    max_rss_bytes: int = 0
    """The most memory the guest has held so far; 0 where nobody measured it."""
    cpu_seconds: float = 0.0
    """Processor time of the guest in this attempt."""


class Outcome(StrEnum):
    """How an attempt ended."""

    STAGED = "STAGED"
    FAILED = "FAILED"
    SUPERSEDED = "SUPERSEDED"
    RELEASED = "RELEASED"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything that crosses a socket; the tag is the class's name."""


class Hello(Message, frozen=True):
    """A worker is there."""

    worker: str
    """Its name, which no other worker has."""


class Unknown(Message, frozen=True):
    """Say Hello: the Sentinel does not know this peer, and did not use what it sent."""


class Welcome(Message, frozen=True):
    """The worker may pull jobs, under these limits."""

    guests_folder: str
    inode: int
    """Of the folder around `guests_folder`: a worker that sees another there, or none, does not
    share our filesystem and leaves."""
    database: str
    """Absolute path of the ledger. A worker never opens it: beside it is staged what goes to a
    sink that has no folder."""
    guests: int
    """Warm guests to keep."""
    limits: GuestSettings
    lease_seconds: float = 0.0
    """A worker that is silent so long loses its jobs; 0 where it cannot be lost without us."""


class Ready(Message, frozen=True):
    """The worker has room for `free` more jobs."""

    free: int


class Assign(Message, frozen=True):
    """Jobs claimed for the worker."""

    jobs: list[Assignment]


class Fetch(Message, frozen=True):
    """The worker lacks an artifact."""

    plugin_id: int


class Artifact(Message, frozen=True):
    """A plugin's verified bytes."""

    plugin_id: int
    name: str
    version: str
    source: bytes
    lock: str
    topics: list[str]
    memory_bytes: int = 0
    scratch_bytes: int = 0
    """Both as the MANIFEST asks; the Worker grants no more than its limits. 0 memory: the limit."""
    network: bool = False
    """Whether the MANIFEST asks for the network."""
    refusal: str = ""
    """Why it may not be run; empty where it may."""


class Receipt(Record, frozen=True):
    """What one attempt produced."""

    job_id: int
    fence: int
    outcome: Outcome
    outputs: list[StagedOutput] = []
    error: str = ""
    retryable: bool = True
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    """What the guest was held by, as the host saw it before any plugin code ran."""
    evidence: Evidence = Evidence()


class Conclude(Message, frozen=True):
    """A worker ends the attempts of a batch."""

    receipts: list[Receipt]


class Heartbeat(Message, frozen=True):
    """The worker is alive, though it may be busy. Answered by Granted."""

    sent: float
    """Some clock of the worker's own, above 0."""


class Granted(Message, frozen=True):
    """What the worker holds in the Sentinel's eyes, after every message of it until now.

    It drops what it holds besides; what is not known to it, or has ended, it says (again).
    """

    jobs: list[tuple[int, int]]
    """(job id, fence)."""
    sent: float = 0.0
    """Of the heartbeat that this answers; 0 where jobs were taken away unasked."""


class Goodbye(Message, frozen=True):
    """The worker leaves; what it holds may be given to others."""


class Drain(Message, frozen=True):
    """Take no more jobs; finish or release what runs, then say Goodbye."""

    grace_seconds: float


class Introduction(Record, frozen=True):
    """The first row of a trust log: a key that trusts itself, where nobody else is trusted yet."""

    payload: bytes
    signature: bytes


class Deploy(Message, frozen=True):
    """A signed plugin, from `casparian publish`."""

    file_name: str
    source: bytes
    lock: str
    public_key: bytes
    signature: bytes
    statement: bytes
    """What was signed, byte for byte: `security.signing` says what is in it."""
    introduction: Introduction | None = None
    """Of the publisher's key, where the ledger trusts none yet; else it is passed over."""
    token: str = ""
    """Azure AD access token, where publishers sign in; never stored."""
    dry_run: bool = False
    """Check everything, change nothing."""


class Ring(Message, frozen=True):
    """Something changed in the ledger; `scan` asks for a full scan as well."""

    scan: bool = False


class Ask(Message, frozen=True):
    """What has the wire refused so far? The Reply's text is a JSON object: kind -> count."""


class Reply(Message, frozen=True):
    """The answer to a client."""

    ok: bool
    text: str
    hint: str = ""
    exit_code: int = 0
    """What the command line should end with, where it is not ok."""


AnyMessage = (
    Hello | Unknown | Welcome | Ready | Assign | Fetch | Artifact | Conclude | Granted
    | Heartbeat | Goodbye | Drain | Deploy | Ring | Ask | Reply
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> list[bytes]:
    """The frames of a message."""
    return [VERSION, _encoder.encode(message)]


def decode(frames: list[bytes]) -> AnyMessage:
    """The message in these frames.

    Raises:
        ProtocolError: another version, another number of frames, or a body that does not fit.
    """
    if len(frames) != 2 or frames[0] != VERSION:
        raise ProtocolError(f"not a message of ours: {len(frames)} frames")
    try:
        message: AnyMessage = _decoder.decode(frames[1])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"a message that does not fit: {error}") from error
    return message


# What the name of a topic says: one that ends in `_rejects` has what could not be read.


REJECTS_SUFFIX = "_rejects"


def reject_topics(topics: Collection[str]) -> set[str]:
    """The topics of rejects among those of one plugin.

    A plugin without any other topic has none: what it makes is data, whatever it is called.
    """
    found = {topic for topic in topics if topic.endswith(REJECTS_SUFFIX)}
    return found if len(found) < len(set(topics)) else set()


def data_topics(reject: str, topics: Collection[str]) -> set[str]:
    """The topics of data that a topic of rejects belongs to: the one it is named after, else every
    one of the plugin."""
    own = reject.removesuffix(REJECTS_SUFFIX)
    return {own} if own in topics else set(topics) - reject_topics(topics)
