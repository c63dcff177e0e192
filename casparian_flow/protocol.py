"""The messages between Sentinel, Workers and the command line, and their encoding.

Pure: imports no zmq. A message is two frames, the protocol version and a MessagePack body whose
tag names the type. Rows are never sent: a Worker stages them on disk and sends a receipt. Any
message may be lost, repeated or late, since the ledger has the state.

    Worker -> Sentinel   Hello, Ready, Fetch, Conclude, Heartbeat, Goodbye
    Sentinel -> Worker   Unknown, Welcome, Assign, Granted, Artifact, Drain
    client -> Sentinel   Deploy, Ring, GetStats
    Sentinel -> client   Reply

ZeroMQ's handshake authenticates the sender (`engine.wire`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from enum import StrEnum

import msgspec

from casparian_flow.config import GuestSettings
from casparian_flow.errors import ProtocolError

VERSION = b"CF1"
FRAME_LIMIT = 64 << 20
"""Bytes; a larger frame closes the connection. Artifacts are the largest messages."""

MODES = ("append", "replace", "error")
"""What publishing does with rows that the sink already has (docs/sinks.md)."""

Pair = tuple[int, int]
"""A job's id and fence, which identify an attempt."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; also used between the Worker's own modules."""


class State(StrEnum):
    """What readers see of a published output. The ledger decides (`db.visibility`), the sink is
    told."""

    CURRENT = "current"
    """It stands in its location slot: the newest version of the file that was worked."""
    PAST = "past"
    """It stands in its version slot only: an earlier version of the file."""
    HIDDEN = "hidden"
    """Another output stands in its version slot, or its file is gone and was to take its rows
    along."""
    RETRACTED = "retracted"
    """A user retracted its version."""


class Output(Record, frozen=True):
    """What one job gives one topic in one sink, from the claim to the sink and back.

    The first fields are known when the job is claimed, the second group when a Worker has staged
    the rows, the last when the sink has published them.
    """

    output_key: str
    """SHA-256 over the facts that make it this output: the same for every attempt."""
    topic: str
    uri: str
    """The sink as configured; part of the output key."""
    location: str
    """The sink with an absolute path, as it is opened."""
    mode: str
    """One of `MODES`: whether the topic shows past versions."""
    source: str
    """Name of the source root."""
    path: bytes
    """Of the file, relative to the source root."""
    ordinal: int
    """Number of the version, from 1 for the first content of its location."""
    content_hash: str
    """SHA-256 of the version's bytes, hexadecimal."""
    file_bytes: int
    """Size of the version."""
    plugin: str
    plugin_version: str
    artifact_hash: str
    version_id: int
    job_id: int
    topics: str = ""
    """All topics of the plugin, joined by `/`, for hints."""
    split_bytes: int = 0
    """Size of the parts of a large output, for sinks that store files; 0: never split."""
    generation: int = 0
    """How often its job has been rebuilt; above 0 it is part of the output key. The columns of a
    rebuilt output may differ from those of the topic."""
    keeps_columns: bool = False
    """Whether they may not, although it is rebuilt: other rows stay in the topic (`db.rebuild`)."""

    stage: str = ""
    """Absolute path of the staged file, or of the folder with its parts; empty if the plugin gave
    the topic no rows: such an output is only recorded."""
    rows: int = 0
    size_bytes: int = 0
    """Size of the staged file."""
    digest: str = ""
    """SHA-256 of the staged file, hexadecimal; of a folder, over those of its parts. Once
    published: of the target if that is files."""

    state: State = State.HIDDEN
    """What readers see of it, or are to see once the sink is told."""
    target: str = ""
    """Absolute path of the file or of the folder with its parts, or the database and table."""
    shown_at: str = ""
    """When readers first saw it, ISO 8601 in UTC; empty if they have not."""
    hidden_at: str = ""
    """When they ceased to; empty while they do."""

    @property
    def visible(self) -> bool:
        """Whether the topic itself shows it."""
        return self.state == State.CURRENT or (self.state == State.PAST and self.mode != "replace")

    @property
    def version_slot(self) -> str:
        """Key of (version, plugin, topic, sink): at most one of its outputs stands."""
        return key_of(
            self.source, self.path, self.content_hash, str(self.ordinal), self.plugin, self.topic,
            self.uri,
        )  # fmt: skip

    @property
    def location_slot(self) -> str:
        """Key of (location, plugin, topic, sink): at most one of its outputs is current."""
        return key_of(self.source, self.path, self.plugin, self.topic, self.uri)


def key_of(*parts: str | bytes) -> str:
    """SHA-256, hexadecimal. Each part is preceded by its length (8 bytes, big endian), so that
    different lists of parts have different keys."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


class Publication(Record, frozen=True):
    """What one job publishes in one store (`sinks.store`), in one step."""

    outputs: list[Output]
    """Their `state` is the one that they get."""
    changes: list[Output] = []
    """Outputs that the store has, with the state that they get instead of their present one."""


class Assignment(Record, frozen=True):
    """One attempt of one job, with everything a Worker needs: it never reads the ledger."""

    job_id: int
    fence: int
    attempt: str
    """Unique name of the attempt, in the names of its staged files."""
    plugin_id: int
    plugin_version: str
    version_id: int
    source: str
    path: bytes
    """Absolute path of the file, as bytes."""
    rel_path: str
    content_hash: str
    size_bytes: int
    timeout_seconds: float
    outputs: list[Output]
    kept_file: str = ""
    """Absolute path of the version's bytes in the store; empty if they are not in a file there."""
    kept_row: int = 0
    """Row of a small version's bytes in the store; 0 if they are in none."""
    kept_bytes: bytes | None = None
    """What that row has; empty if it cannot be read. The Sentinel fills it in, so that a Worker
    opens no database."""
    may_be_empty: list[str] = []
    """Data topics that may get no row although the file gives rejects."""


class Evidence(Record, frozen=True):
    """What the host measured of an attempt."""

    fault: str = ""
    """Class name of the error (`casparian_flow.errors`); empty if it succeeded."""
    signal: str = ""
    """Signal that ended the guest, such as `SIGSEGV`; empty if none did."""
    exit_code: int | None = None
    """Of the guest; None if it still runs or a signal ended it."""
    batches: int = 0
    rows: int = 0
    """Received before the attempt ended."""
    max_rss_bytes: int = 0
    """Peak memory of the guest so far; 0 if not measured."""
    cpu_seconds: float = 0.0
    """Processor time of the guest in this attempt."""


class Outcome(StrEnum):
    """How an attempt ended."""

    STAGED = "STAGED"
    FAILED = "FAILED"
    SUPERSEDED = "SUPERSEDED"
    RELEASED = "RELEASED"


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the tag is the class's name."""


class Hello(Message, frozen=True):
    """A Worker asks to be admitted."""

    worker: str
    """Its unique name."""


class Unknown(Message, frozen=True):
    """The Sentinel does not know this peer and ignored its message; the peer must send Hello."""


class Welcome(Message, frozen=True):
    """The Worker is admitted, under these limits."""

    guests_folder: str
    inode: int
    """Inode of the parent of `guests_folder`: a Worker that sees another does not share our
    filesystem, and leaves."""
    database: str
    """Absolute path of the ledger. A Worker never opens it; outputs for sinks without a folder are
    staged beside it."""
    guests: int
    """Number of warm guests to keep."""
    limits: GuestSettings
    lease_seconds: float = 0.0
    """A Worker that is silent this long loses its jobs; 0 for a Worker in the daemon's process."""


class Ready(Message, frozen=True):
    """The Worker has room for `free` more jobs."""

    free: int


class Assign(Message, frozen=True):
    """Jobs that were claimed for the Worker."""

    jobs: list[Assignment]


class Fetch(Message, frozen=True):
    """The Worker needs an artifact."""

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
    """As the MANIFEST asks; the Worker caps both at its limits. Memory 0: the limit."""
    network: bool = False
    """Whether the MANIFEST asks for the network."""
    refusal: str = ""
    """Why the plugin may not run; empty if it may."""


class Receipt(Record, frozen=True):
    """Result of one attempt."""

    job_id: int
    fence: int
    outcome: Outcome
    outputs: list[Output] = []
    error: str = ""
    retryable: bool = True
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    """Layers of the guest's sandbox when plugin code began, such as `limits, landlock, seccomp`."""
    evidence: Evidence = Evidence()


class Conclude(Message, frozen=True):
    """The results of a batch of attempts."""

    receipts: list[Receipt]


class Heartbeat(Message, frozen=True):
    """The Worker is alive. Answered with Granted."""

    sent: float
    """Time on the Worker's monotonic clock, above 0."""


class Granted(Message, frozen=True):
    """The attempts that the Sentinel believes the Worker to hold.

    The Worker ends all others, and sends (again) the receipts of those that have ended or that it
    does not know.
    """

    jobs: list[tuple[int, int]]
    """(job id, fence)."""
    sent: float = 0.0
    """`sent` of the heartbeat that this answers; 0 if the Sentinel revoked attempts."""


class Goodbye(Message, frozen=True):
    """The Worker leaves; its jobs go back to the queue."""


class Drain(Message, frozen=True):
    """Take no more jobs; finish or release the running ones, then send Goodbye."""

    grace_seconds: float


class Introduction(Record, frozen=True):
    """The first row of a trust log: a key that trusts itself, if no key is trusted yet."""

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
    """The signed bytes: a `security.signing.Publish` statement."""
    introduction: Introduction | None = None
    """Of the publisher's key; ignored if the ledger already trusts a key."""
    token: str = ""
    """Azure AD access token, if publishers sign in; never stored."""
    dry_run: bool = False
    """Check everything, change nothing."""


class Ring(Message, frozen=True):
    """The ledger has changed: look at it. `scan` also requests a full scan."""

    scan: bool = False


class GetStats(Message, frozen=True, tag="Ask"):
    """Ask how much the wire has refused. The Reply's text is a JSON object: kind -> count."""


class Reply(Message, frozen=True):
    """The answer to a client."""

    ok: bool
    text: str
    hint: str = ""
    exit_code: int = 0
    """Exit code for the command line if not `ok`."""


AnyMessage = (
    Hello | Unknown | Welcome | Ready | Assign | Fetch | Artifact | Conclude | Granted
    | Heartbeat | Goodbye | Drain | Deploy | Ring | GetStats | Reply
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> list[bytes]:
    """Encode a message as frames."""
    return [VERSION, _encoder.encode(message)]


def decode(frames: list[bytes]) -> AnyMessage:
    """Decode a message.

    Raises:
        ProtocolError: wrong version, wrong number of frames, or an invalid body.
    """
    if len(frames) != 2 or frames[0] != VERSION:
        raise ProtocolError(f"not a Casparian Flow message: {len(frames)} frames")
    try:
        message: AnyMessage = _decoder.decode(frames[1])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"a malformed message: {error}") from error
    return message


REJECTS_SUFFIX = "_rejects"
"""A topic whose name ends so has what could not be read."""


def reject_topics(topics: Collection[str]) -> set[str]:
    """The topics of rejects among one plugin's topics; none if all names end in the suffix."""
    rejects = {topic for topic in topics if topic.endswith(REJECTS_SUFFIX)}
    return rejects if len(rejects) < len(set(topics)) else set()


def data_topics(reject: str, topics: Collection[str]) -> set[str]:
    """The data topics that a topic of rejects belongs to: the one that it is named after, else all
    of the plugin's."""
    own = reject.removesuffix(REJECTS_SUFFIX)
    return {own} if own in topics else set(topics) - reject_topics(topics)
