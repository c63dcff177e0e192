-- The first schema. Frozen: a later change is a later file.

CREATE TABLE cf_audit (
    seq INTEGER NOT NULL, 
    at VARCHAR NOT NULL, 
    actor VARCHAR NOT NULL, 
    action VARCHAR NOT NULL, 
    subject VARCHAR NOT NULL, 
    detail VARCHAR NOT NULL, 
    previous VARCHAR NOT NULL, 
    hash VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_audit PRIMARY KEY (seq)
);

CREATE TABLE cf_epoch (
    id INTEGER NOT NULL, 
    started_at DATETIME NOT NULL, 
    pid INTEGER NOT NULL, 
    host VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_epoch PRIMARY KEY (id)
);

CREATE TABLE cf_plugin (
    id INTEGER NOT NULL, 
    name VARCHAR NOT NULL, 
    version VARCHAR NOT NULL, 
    source BLOB NOT NULL, 
    lock VARCHAR NOT NULL, 
    manifest VARCHAR NOT NULL, 
    artifact_hash VARCHAR NOT NULL, 
    public_key BLOB NOT NULL, 
    signature BLOB NOT NULL, 
    publisher VARCHAR NOT NULL, 
    deployed_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_plugin PRIMARY KEY (id), 
    CONSTRAINT uq_cf_plugin_name_version UNIQUE (name, version)
);

CREATE TABLE cf_plugin_config (
    id INTEGER NOT NULL, 
    plugin_name VARCHAR NOT NULL, 
    subscription_tags VARCHAR NOT NULL, 
    active_version VARCHAR, 
    CONSTRAINT pk_cf_plugin_config PRIMARY KEY (id), 
    CONSTRAINT uq_cf_plugin_config_plugin_name UNIQUE (plugin_name)
);

CREATE TABLE cf_routing_rule (
    id INTEGER NOT NULL, 
    pattern VARCHAR NOT NULL, 
    tag VARCHAR NOT NULL, 
    priority INTEGER NOT NULL, 
    CONSTRAINT pk_cf_routing_rule PRIMARY KEY (id), 
    CONSTRAINT uq_cf_routing_rule_pattern_tag UNIQUE (pattern, tag)
);

CREATE INDEX ix_cf_routing_rule_tag ON cf_routing_rule (tag);

CREATE TABLE cf_source_root (
    id INTEGER NOT NULL, 
    path VARCHAR NOT NULL, 
    name VARCHAR NOT NULL, 
    active BOOLEAN NOT NULL, 
    "ignore" VARCHAR NOT NULL, 
    settle_seconds DOUBLE NOT NULL, 
    CONSTRAINT pk_cf_source_root PRIMARY KEY (id), 
    CONSTRAINT ck_cf_source_root_settle CHECK (settle_seconds >= 0), 
    CONSTRAINT uq_cf_source_root_path UNIQUE (path), 
    CONSTRAINT uq_cf_source_root_name UNIQUE (name)
);

CREATE TABLE cf_topic_config (
    id INTEGER NOT NULL, 
    plugin_name VARCHAR NOT NULL, 
    topic_name VARCHAR NOT NULL, 
    uri VARCHAR NOT NULL, 
    mode VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_topic_config PRIMARY KEY (id), 
    CONSTRAINT uq_cf_topic_config_plugin_name_topic_name_uri UNIQUE (plugin_name, topic_name, uri)
);

CREATE TABLE cf_directory (
    id INTEGER NOT NULL, 
    source_root_id INTEGER NOT NULL, 
    parent_id INTEGER, 
    path BLOB NOT NULL, 
    digest BLOB, 
    CONSTRAINT pk_cf_directory PRIMARY KEY (id), 
    CONSTRAINT uq_cf_directory_source_root_id_path UNIQUE (source_root_id, path), 
    CONSTRAINT fk_cf_directory_source_root_id FOREIGN KEY(source_root_id) REFERENCES cf_source_root (id), 
    CONSTRAINT fk_cf_directory_parent_id FOREIGN KEY(parent_id) REFERENCES cf_directory (id)
);

CREATE INDEX ix_cf_directory_parent_id ON cf_directory (parent_id);

CREATE TABLE cf_scan_state (
    source_root_id INTEGER NOT NULL, 
    started DOUBLE NOT NULL, 
    finished DOUBLE NOT NULL, 
    files INTEGER NOT NULL, 
    unreadable INTEGER NOT NULL, 
    unsettled INTEGER NOT NULL, 
    problem VARCHAR NOT NULL, 
    device INTEGER, 
    routed VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_scan_state PRIMARY KEY (source_root_id), 
    CONSTRAINT fk_cf_scan_state_source_root_id FOREIGN KEY(source_root_id) REFERENCES cf_source_root (id)
);

CREATE TABLE cf_file_location (
    id INTEGER NOT NULL, 
    source_root_id INTEGER NOT NULL, 
    directory_id INTEGER NOT NULL, 
    path BLOB NOT NULL, 
    rel_path VARCHAR NOT NULL, 
    discovered_at DATETIME NOT NULL, 
    gone_at DATETIME, 
    current_version_id INTEGER, 
    problem VARCHAR NOT NULL, 
    device INTEGER, 
    inode INTEGER, 
    size_bytes INTEGER, 
    mtime_ns INTEGER, 
    ctime_ns INTEGER, 
    racy BOOLEAN NOT NULL, 
    CONSTRAINT pk_cf_file_location PRIMARY KEY (id), 
    CONSTRAINT uq_cf_file_location_source_root_id_path UNIQUE (source_root_id, path), 
    CONSTRAINT fk_cf_file_location_source_root_id FOREIGN KEY(source_root_id) REFERENCES cf_source_root (id), 
    CONSTRAINT fk_cf_file_location_directory_id FOREIGN KEY(directory_id) REFERENCES cf_directory (id), 
    CONSTRAINT fk_cf_file_location_current_version_id FOREIGN KEY(current_version_id) REFERENCES cf_file_version (id)
);

CREATE INDEX ix_cf_file_location_directory_id ON cf_file_location (directory_id);

CREATE TABLE cf_file_version (
    id INTEGER NOT NULL, 
    location_id INTEGER NOT NULL, 
    ordinal INTEGER NOT NULL, 
    content_hash VARCHAR NOT NULL, 
    size_bytes INTEGER NOT NULL, 
    detected_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_file_version PRIMARY KEY (id), 
    CONSTRAINT uq_cf_file_version_location_id_ordinal UNIQUE (location_id, ordinal), 
    CONSTRAINT ck_cf_file_version_content_hash CHECK (length(content_hash) = 64), 
    CONSTRAINT ck_cf_file_version_size_bytes CHECK (size_bytes >= 0), 
    CONSTRAINT fk_cf_file_version_location_id FOREIGN KEY(location_id) REFERENCES cf_file_location (id)
);

CREATE TABLE cf_processing_queue (
    id INTEGER NOT NULL, 
    file_version_id INTEGER NOT NULL, 
    plugin_id INTEGER NOT NULL, 
    plugin_name VARCHAR NOT NULL, 
    status VARCHAR NOT NULL, 
    priority INTEGER NOT NULL, 
    fence INTEGER NOT NULL, 
    attempts INTEGER NOT NULL, 
    not_before DOUBLE NOT NULL, 
    worker VARCHAR, 
    epoch INTEGER, 
    reason VARCHAR NOT NULL, 
    created_at DATETIME NOT NULL, 
    finished_at DATETIME, 
    CONSTRAINT pk_cf_processing_queue PRIMARY KEY (id), 
    CONSTRAINT uq_cf_processing_queue_file_version_id_plugin_id UNIQUE (file_version_id, plugin_id), 
    CONSTRAINT ck_cf_processing_queue_status CHECK (status IN ('QUEUED', 'RUNNING', 'COMMITTING', 'COMPLETED', 'FAILED', 'ABORTED', 'SUPERSEDED')), 
    CONSTRAINT ck_cf_processing_queue_worker CHECK ((status = 'RUNNING') = (worker IS NOT NULL)), 
    CONSTRAINT ck_cf_processing_queue_fence CHECK (attempts >= 0 AND fence >= attempts), 
    CONSTRAINT fk_cf_processing_queue_file_version_id FOREIGN KEY(file_version_id) REFERENCES cf_file_version (id), 
    CONSTRAINT fk_cf_processing_queue_plugin_id FOREIGN KEY(plugin_id) REFERENCES cf_plugin (id), 
    CONSTRAINT fk_cf_processing_queue_epoch FOREIGN KEY(epoch) REFERENCES cf_epoch (id)
);

CREATE INDEX ix_cf_processing_queue_order ON cf_processing_queue (status, priority DESC, id);

CREATE TABLE cf_attempt (
    id INTEGER NOT NULL, 
    job_id INTEGER NOT NULL, 
    fence INTEGER NOT NULL, 
    epoch INTEGER NOT NULL, 
    worker VARCHAR NOT NULL, 
    outcome VARCHAR NOT NULL, 
    error VARCHAR NOT NULL, 
    log VARCHAR NOT NULL, 
    seconds DOUBLE NOT NULL, 
    ended_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_attempt PRIMARY KEY (id), 
    CONSTRAINT uq_cf_attempt_job_id_fence UNIQUE (job_id, fence), 
    CONSTRAINT fk_cf_attempt_job_id FOREIGN KEY(job_id) REFERENCES cf_processing_queue (id), 
    CONSTRAINT fk_cf_attempt_epoch FOREIGN KEY(epoch) REFERENCES cf_epoch (id)
);

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
    CONSTRAINT pk_cf_output PRIMARY KEY (id), 
    CONSTRAINT uq_cf_output_job_id_topic_uri UNIQUE (job_id, topic, uri), 
    CONSTRAINT ck_cf_output_state CHECK (state IN ('PLANNED', 'PUBLISHED', 'REFUSED')), 
    CONSTRAINT ck_cf_output_published CHECK ((state = 'PUBLISHED') = (published_at IS NOT NULL)), 
    CONSTRAINT fk_cf_output_job_id FOREIGN KEY(job_id) REFERENCES cf_processing_queue (id)
);

CREATE INDEX ix_cf_output_topic ON cf_output (topic, state);


-- What is written once stays: the database itself refuses.

CREATE TRIGGER cf_file_version_no_update BEFORE UPDATE ON cf_file_version
BEGIN SELECT RAISE(ABORT, 'a version is never changed'); END;

CREATE TRIGGER cf_file_version_no_delete BEFORE DELETE ON cf_file_version
BEGIN SELECT RAISE(ABORT, 'a version is never deleted'); END;

CREATE TRIGGER cf_plugin_no_update BEFORE UPDATE ON cf_plugin
BEGIN SELECT RAISE(ABORT, 'a deployed plugin is never changed'); END;

CREATE TRIGGER cf_plugin_no_delete BEFORE DELETE ON cf_plugin
BEGIN SELECT RAISE(ABORT, 'a deployed plugin is never deleted'); END;

CREATE TRIGGER cf_attempt_no_update BEFORE UPDATE ON cf_attempt
BEGIN SELECT RAISE(ABORT, 'an attempt is never changed'); END;

CREATE TRIGGER cf_attempt_no_delete BEFORE DELETE ON cf_attempt
BEGIN SELECT RAISE(ABORT, 'an attempt is never deleted'); END;

CREATE TRIGGER cf_audit_no_update BEFORE UPDATE ON cf_audit
BEGIN SELECT RAISE(ABORT, 'an audit row is never changed'); END;

CREATE TRIGGER cf_audit_no_delete BEFORE DELETE ON cf_audit
BEGIN SELECT RAISE(ABORT, 'an audit row is never deleted'); END;

-- The arrows of docs/job_lifecycle.md; after COMMITTING only forward.

CREATE TRIGGER cf_processing_queue_arrows BEFORE UPDATE OF status ON cf_processing_queue
WHEN OLD.status <> NEW.status AND OLD.status || '>' || NEW.status NOT IN (
    'QUEUED>RUNNING', 'QUEUED>ABORTED', 'QUEUED>SUPERSEDED',
    'RUNNING>COMMITTING', 'RUNNING>QUEUED', 'RUNNING>FAILED', 'RUNNING>ABORTED',
    'RUNNING>SUPERSEDED',
    'COMMITTING>COMPLETED', 'COMMITTING>FAILED',
    'FAILED>QUEUED', 'ABORTED>QUEUED', 'SUPERSEDED>QUEUED'
)
BEGIN SELECT RAISE(ABORT, 'a job does not move that way'); END;

CREATE TRIGGER cf_processing_queue_no_delete BEFORE DELETE ON cf_processing_queue
BEGIN SELECT RAISE(ABORT, 'a job is never deleted'); END;
