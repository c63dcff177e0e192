"""The tables that only grow: what was deployed, signed, tried and done.

No row of these is ever updated or deleted; triggers of the database refuse it.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from casparian_flow.db.base import Base, utcnow


class Plugin(Base):
    """A deployed artifact: immutable."""

    __tablename__ = "cf_plugin"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    source: Mapped[bytes]
    lock: Mapped[str]
    manifest: Mapped[str]
    """JSON of what was read from the source."""
    artifact_hash: Mapped[str]
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    publisher: Mapped[str]
    """Who published: the key's id."""
    deployed_at: Mapped[datetime] = mapped_column(default=utcnow)
    statement: Mapped[bytes | None]
    """What was signed, byte for byte; NULL where an earlier release signed it in its own form."""
    verdict: Mapped[str] = mapped_column(default="", server_default="")
    """JSON: the Gatekeeper's ruleset and policy under which it was let in."""


class TrustStatement(Base):
    """What people signed about keys and plugins, in order: the trust of this ledger.

    Replaying the rows from the first gives which keys are trusted for which plugins, which keys
    are revoked, and which versions were activated or disabled.
    """

    __tablename__ = "cf_trust_statement"

    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """trust-key, revoke-key, rotate-key, activate, disable."""
    payload: Mapped[bytes]
    """What was signed, byte for byte: JSON, with the hash of the row before in it."""
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    countersignature: Mapped[bytes] = mapped_column(default=b"")
    """The new key's signature over the same bytes, where a key is rotated."""


class LedgerIdentity(Base):
    """The one row that tells this ledger from every other; signatures name it."""

    __tablename__ = "cf_ledger_identity"

    id: Mapped[str] = mapped_column(primary_key=True)
    """32 random hexadecimal digits, made when the ledger was."""


class Epoch(Base):
    """One run of a process that claims jobs; the newest is the only living one."""

    __tablename__ = "cf_epoch"

    id: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(default=utcnow)
    pid: Mapped[int]
    host: Mapped[str]


class Attempt(Base):
    """One run of a job, written when it ended."""

    __tablename__ = "cf_attempt"
    __table_args__ = (UniqueConstraint("job_id", "fence"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("cf_processing_queue.id"))
    fence: Mapped[int]
    epoch: Mapped[int] = mapped_column(ForeignKey("cf_epoch.id"))
    worker: Mapped[str]
    outcome: Mapped[str]
    error: Mapped[str] = mapped_column(default="")
    log: Mapped[str] = mapped_column(default="")
    """What the plugin printed, and its traceback; at most 64 KiB."""
    seconds: Mapped[float] = mapped_column(default=0.0)
    ended_at: Mapped[datetime] = mapped_column(default=utcnow)
    sandbox: Mapped[str] = mapped_column(default="", server_default="")
    """What the guest was held by; empty where none ran."""
    fault: Mapped[str] = mapped_column(default="", server_default="")
    """The class of the error (`casparian_flow.errors`); empty where it ended well."""
    signal: Mapped[str] = mapped_column(default="", server_default="")
    """What ended the guest, such as `SIGSEGV`; empty where no signal did."""
    exit_code: Mapped[int | None]
    """Of the guest; NULL where it lived on or a signal ended it."""
    batches: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    rows: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """What had come of its output when it ended."""
    max_rss_bytes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """The most memory its guest had held so far; 0 where nobody measured it."""
    cpu_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    """Processor time of the guest in this attempt."""


class FoundOutput(Base):
    """An output that stood in a sink and not in this ledger, as an inventory found it.

    The ledger was lost, or is older than its sinks. Its ids are not given again; the version and
    the job that it names get them back when the version's content is found again.
    """

    __tablename__ = "cf_found_output"
    __table_args__ = (
        Index("ix_cf_found_output_version", "source", "path", "ordinal"),
        Index("ix_cf_found_output_file_version_id", "file_version_id"),
        Index("ix_cf_found_output_job_id", "job_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    output_key: Mapped[str] = mapped_column(unique=True)
    location: Mapped[str]
    """The sink with its path made absolute."""
    topic: Mapped[str]
    uri: Mapped[str]
    target: Mapped[str]
    rows: Mapped[int]
    digest: Mapped[str]
    job_id: Mapped[int]
    file_version_id: Mapped[int]
    source: Mapped[str]
    """Name of the source root; empty where an earlier release published it."""
    path: Mapped[bytes]
    ordinal: Mapped[int]
    content_hash: Mapped[str]
    size_bytes: Mapped[int]
    artifact_hash: Mapped[str]
    plugin_name: Mapped[str]
    plugin_version: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(default=utcnow)
    mode: Mapped[str] = mapped_column(default="append", server_default="append")
    slot: Mapped[str] = mapped_column(default="", server_default="")


_ABOUT_TRUST = "action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable')"


class AuditEntry(Base):
    """What people did and what was committed, each row hashed with the one before."""

    __tablename__ = "cf_audit"
    __table_args__ = (
        Index("ix_cf_audit_trust", "seq", sqlite_where=text(_ABOUT_TRUST)),
        Index("ix_cf_audit_seal", "seq", sqlite_where=text("action = 'seal'")),
    )

    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[str]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[str]
    """JSON."""
    previous: Mapped[str]
    hash: Mapped[str]
    """SHA-256 over every other column, hexadecimal."""
