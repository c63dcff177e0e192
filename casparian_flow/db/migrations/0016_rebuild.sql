-- A plugin's outputs are made again, beside those that stand. Frozen: a later change is a later file.

ALTER TABLE cf_processing_queue ADD COLUMN generation INTEGER DEFAULT 0 NOT NULL;

-- A job has an output of a topic in a sink once in each generation. SQLite changes no constraint of
-- a table, so the table is made anew, and with it the one that refers to it.

DROP TRIGGER cf_processing_queue_adopted;

ALTER TABLE cf_visibility RENAME TO cf_visibility_before;

ALTER TABLE cf_output RENAME TO cf_output_before;

CREATE TABLE cf_output (
    id INTEGER NOT NULL, 
    job_id INTEGER NOT NULL, 
    topic VARCHAR NOT NULL, 
    uri VARCHAR NOT NULL, 
    location VARCHAR NOT NULL, 
    mode VARCHAR NOT NULL, 
    output_key VARCHAR NOT NULL, 
    state VARCHAR NOT NULL, 
    stage VARCHAR NOT NULL, 
    target VARCHAR NOT NULL, 
    rows INTEGER NOT NULL, 
    size_bytes INTEGER NOT NULL, 
    digest VARCHAR NOT NULL, 
    published_at DATETIME, 
    slot VARCHAR DEFAULT '' NOT NULL, 
    generation INTEGER DEFAULT 0 NOT NULL, 
    CONSTRAINT pk_cf_output PRIMARY KEY (id), 
    CONSTRAINT uq_cf_output_job_id_topic_uri_generation UNIQUE (job_id, topic, uri, generation), 
    CONSTRAINT ck_cf_output_state CHECK (state IN ('PLANNED', 'PUBLISHED', 'REFUSED')), 
    CONSTRAINT ck_cf_output_published CHECK ((state = 'PUBLISHED') = (published_at IS NOT NULL)), 
    CONSTRAINT fk_cf_output_job_id FOREIGN KEY(job_id) REFERENCES cf_processing_queue (id)
);

INSERT INTO cf_output (id, job_id, topic, uri, location, mode, output_key, state, stage, target, rows,
                       size_bytes, digest, published_at, slot)
SELECT id, job_id, topic, uri, location, mode, output_key, state, stage, target, rows, size_bytes,
       digest, published_at, slot
FROM cf_output_before ORDER BY id;

CREATE TABLE cf_visibility (
    output_id INTEGER NOT NULL, 
    state VARCHAR NOT NULL, 
    mode VARCHAR NOT NULL, 
    told VARCHAR DEFAULT '' NOT NULL, 
    shown_at DATETIME, 
    hidden_at DATETIME, 
    changed_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_visibility PRIMARY KEY (output_id), 
    CONSTRAINT ck_cf_visibility_state CHECK (state IN ('current', 'past', 'hidden', 'retracted', 'removed')), 
    CONSTRAINT fk_cf_visibility_output_id FOREIGN KEY(output_id) REFERENCES cf_output (id)
);

INSERT INTO cf_visibility (output_id, state, mode, told, shown_at, hidden_at, changed_at)
SELECT output_id, state, mode, told, shown_at, hidden_at, changed_at
FROM cf_visibility_before ORDER BY output_id;

DROP TABLE cf_visibility_before;

DROP TABLE cf_output_before;

CREATE INDEX ix_cf_output_topic ON cf_output (topic, state);

CREATE INDEX ix_cf_output_slot ON cf_output (slot);

CREATE INDEX ix_cf_visibility_debts ON cf_visibility (output_id) WHERE told <> state || '/' || mode;

CREATE INDEX ix_cf_visibility_hidden ON cf_visibility (changed_at) WHERE state = 'hidden';

CREATE TRIGGER cf_processing_queue_adopted BEFORE UPDATE OF status ON cf_processing_queue
WHEN NEW.status = 'COMPLETED' AND OLD.status IN ('QUEUED', 'FAILED', 'ABORTED', 'SUPERSEDED')
    AND NOT EXISTS (SELECT 1 FROM cf_output WHERE job_id = NEW.id AND state = 'PUBLISHED')
BEGIN SELECT RAISE(ABORT, 'a job without published outputs is not complete'); END;

-- The rebuilds, and the jobs of each.

CREATE TABLE cf_rebuild (
    id INTEGER NOT NULL, 
    plugin_name VARCHAR NOT NULL, 
    topic VARCHAR DEFAULT '' NOT NULL, 
    started_at DATETIME NOT NULL, 
    ended_at DATETIME, 
    outcome VARCHAR DEFAULT '' NOT NULL, 
    problem VARCHAR DEFAULT '' NOT NULL, 
    CONSTRAINT pk_cf_rebuild PRIMARY KEY (id), 
    CONSTRAINT ck_cf_rebuild_outcome CHECK (outcome IN ('', 'done', 'cancelled')), 
    CONSTRAINT ck_cf_rebuild_ended CHECK ((outcome = '') = (ended_at IS NULL))
);

CREATE UNIQUE INDEX ix_cf_rebuild_open ON cf_rebuild (plugin_name) WHERE ended_at IS NULL;

CREATE TABLE cf_rebuild_job (
    rebuild_id INTEGER NOT NULL, 
    job_id INTEGER NOT NULL, 
    generation INTEGER NOT NULL, 
    was VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_rebuild_job PRIMARY KEY (rebuild_id, job_id), 
    CONSTRAINT fk_cf_rebuild_job_rebuild_id FOREIGN KEY(rebuild_id) REFERENCES cf_rebuild (id), 
    CONSTRAINT fk_cf_rebuild_job_job_id FOREIGN KEY(job_id) REFERENCES cf_processing_queue (id)
);

CREATE INDEX ix_cf_rebuild_job_job_id ON cf_rebuild_job (job_id);

-- Outputs that were left behind in sinks their topic does not go to any more.

CREATE TABLE cf_left_output (
    output_id INTEGER NOT NULL, 
    rebuild_id INTEGER, 
    CONSTRAINT pk_cf_left_output PRIMARY KEY (output_id), 
    CONSTRAINT fk_cf_left_output_output_id FOREIGN KEY(output_id) REFERENCES cf_output (id), 
    CONSTRAINT fk_cf_left_output_rebuild_id FOREIGN KEY(rebuild_id) REFERENCES cf_rebuild (id)
);
