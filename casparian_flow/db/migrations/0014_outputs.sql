-- What readers see of each output. Frozen: a later change is a later file.

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

CREATE INDEX ix_cf_visibility_debts ON cf_visibility (output_id) WHERE told <> state || '/' || mode;

CREATE INDEX ix_cf_visibility_hidden ON cf_visibility (changed_at) WHERE state = 'hidden';

-- A retraction belongs to a version: of all plugins, topics and artifacts.

CREATE TABLE cf_retracted_version (
    file_version_id INTEGER NOT NULL, 
    retracted_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_retracted_version PRIMARY KEY (file_version_id), 
    CONSTRAINT fk_cf_retracted_version_file_version_id FOREIGN KEY(file_version_id) REFERENCES cf_file_version (id)
);

INSERT INTO cf_retracted_version (file_version_id, retracted_at)
SELECT j.file_version_id, min(t.retracted_at)
FROM cf_retracted_output t JOIN cf_output o ON o.output_key = t.output_key
JOIN cf_processing_queue j ON j.id = o.job_id
WHERE t.state <> 'REINSTATING' AND o.state = 'PUBLISHED' GROUP BY j.file_version_id;

DROP TABLE cf_retracted_output;

-- Ids up to these are taken, by outputs whose versions and jobs this ledger does not have.

CREATE TABLE cf_id_floor (
    id INTEGER NOT NULL, 
    version_id INTEGER NOT NULL, 
    job_id INTEGER NOT NULL, 
    CONSTRAINT pk_cf_id_floor PRIMARY KEY (id), 
    CONSTRAINT ck_cf_id_floor_single CHECK (id = 1)
);

INSERT INTO cf_id_floor (id, version_id, job_id)
SELECT 1, coalesce(max(file_version_id), 0), coalesce(max(job_id), 0) FROM cf_found_output;

DROP TABLE cf_found_output;

ALTER TABLE cf_source_root ADD COLUMN on_delete VARCHAR DEFAULT 'keep' NOT NULL;
