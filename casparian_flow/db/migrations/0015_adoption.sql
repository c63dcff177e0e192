-- Outputs of an earlier ledger become rows of this one. Frozen: a later change is a later file.

CREATE TABLE cf_asked_sink (
    location VARCHAR NOT NULL, 
    asked_at DATETIME, 
    problem VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_asked_sink PRIMARY KEY (location)
);

-- The stub of a plugin, which has no manifest, becomes the plugin when the same artifact is
-- published.

DROP TRIGGER cf_plugin_no_update;

CREATE TRIGGER cf_plugin_no_update BEFORE UPDATE ON cf_plugin
WHEN NOT (OLD.manifest = '' AND NEW.manifest <> '' AND NEW.id = OLD.id AND NEW.name = OLD.name
          AND NEW.version = OLD.version AND NEW.artifact_hash = OLD.artifact_hash)
BEGIN SELECT RAISE(ABORT, 'a deployed plugin is never changed'); END;

-- A job whose outputs a sink has is complete, though this ledger has not seen it run.

DROP TRIGGER cf_processing_queue_arrows;

CREATE TRIGGER cf_processing_queue_arrows BEFORE UPDATE OF status ON cf_processing_queue
WHEN OLD.status <> NEW.status AND OLD.status || '>' || NEW.status NOT IN (
    'QUEUED>RUNNING', 'QUEUED>ABORTED', 'QUEUED>SUPERSEDED', 'QUEUED>COMPLETED',
    'RUNNING>COMMITTING', 'RUNNING>QUEUED', 'RUNNING>FAILED', 'RUNNING>ABORTED',
    'RUNNING>SUPERSEDED',
    'COMMITTING>COMPLETED', 'COMMITTING>FAILED',
    'FAILED>QUEUED', 'ABORTED>QUEUED', 'SUPERSEDED>QUEUED', 'COMPLETED>QUEUED',
    'FAILED>COMPLETED', 'ABORTED>COMPLETED', 'SUPERSEDED>COMPLETED'
)
BEGIN SELECT RAISE(ABORT, 'a job does not move that way'); END;

CREATE TRIGGER cf_processing_queue_adopted BEFORE UPDATE OF status ON cf_processing_queue
WHEN NEW.status = 'COMPLETED' AND OLD.status IN ('QUEUED', 'FAILED', 'ABORTED', 'SUPERSEDED')
    AND NOT EXISTS (SELECT 1 FROM cf_output WHERE job_id = NEW.id AND state = 'PUBLISHED')
BEGIN SELECT RAISE(ABORT, 'a job without published outputs is not complete'); END;
