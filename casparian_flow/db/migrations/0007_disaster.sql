-- Outputs found in sinks, and outputs a person took away. Frozen: a later change is a later file.

CREATE TABLE cf_found_output (
    id INTEGER NOT NULL, 
    output_key VARCHAR NOT NULL, 
    location VARCHAR NOT NULL, 
    topic VARCHAR NOT NULL, 
    uri VARCHAR NOT NULL, 
    target VARCHAR NOT NULL, 
    rows INTEGER NOT NULL, 
    digest VARCHAR NOT NULL, 
    job_id INTEGER NOT NULL, 
    file_version_id INTEGER NOT NULL, 
    source VARCHAR NOT NULL, 
    path BLOB NOT NULL, 
    ordinal INTEGER NOT NULL, 
    content_hash VARCHAR NOT NULL, 
    size_bytes INTEGER NOT NULL, 
    artifact_hash VARCHAR NOT NULL, 
    plugin_name VARCHAR NOT NULL, 
    plugin_version VARCHAR NOT NULL, 
    found_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_found_output PRIMARY KEY (id), 
    CONSTRAINT uq_cf_found_output_output_key UNIQUE (output_key)
);

CREATE INDEX ix_cf_found_output_file_version_id ON cf_found_output (file_version_id);

CREATE INDEX ix_cf_found_output_job_id ON cf_found_output (job_id);

CREATE INDEX ix_cf_found_output_version ON cf_found_output (source, path, ordinal);

CREATE TABLE cf_forgotten_output (
    output_key VARCHAR NOT NULL, 
    forgotten_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_forgotten_output PRIMARY KEY (output_key)
);

CREATE TRIGGER cf_found_output_no_update BEFORE UPDATE ON cf_found_output
BEGIN SELECT RAISE(ABORT, 'a found output is never changed'); END;

CREATE TRIGGER cf_found_output_no_delete BEFORE DELETE ON cf_found_output
BEGIN SELECT RAISE(ABORT, 'a found output is never deleted'); END;

-- A person may have a completed job's output made again: COMPLETED>QUEUED.

DROP TRIGGER cf_processing_queue_arrows;

CREATE TRIGGER cf_processing_queue_arrows BEFORE UPDATE OF status ON cf_processing_queue
WHEN OLD.status <> NEW.status AND OLD.status || '>' || NEW.status NOT IN (
    'QUEUED>RUNNING', 'QUEUED>ABORTED', 'QUEUED>SUPERSEDED',
    'RUNNING>COMMITTING', 'RUNNING>QUEUED', 'RUNNING>FAILED', 'RUNNING>ABORTED',
    'RUNNING>SUPERSEDED',
    'COMMITTING>COMPLETED', 'COMMITTING>FAILED',
    'FAILED>QUEUED', 'ABORTED>QUEUED', 'SUPERSEDED>QUEUED', 'COMPLETED>QUEUED'
)
BEGIN SELECT RAISE(ABORT, 'a job does not move that way'); END;
