-- Which contents the snapshot store has. Frozen: a later change is a later file.

CREATE TABLE cf_snapshot (
    content_hash VARCHAR NOT NULL, 
    size_bytes INTEGER NOT NULL, 
    kept_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_snapshot PRIMARY KEY (content_hash), 
    CONSTRAINT ck_cf_snapshot_content_hash CHECK (length(content_hash) = 64), 
    CONSTRAINT ck_cf_snapshot_size_bytes CHECK (size_bytes >= 0)
);

CREATE INDEX ix_cf_snapshot_kept_at ON cf_snapshot (kept_at);

CREATE TABLE cf_snapshot_fault (
    id INTEGER NOT NULL, 
    words VARCHAR NOT NULL, 
    files INTEGER NOT NULL, 
    since DATETIME NOT NULL, 
    CONSTRAINT pk_cf_snapshot_fault PRIMARY KEY (id), 
    CONSTRAINT ck_cf_snapshot_fault_single CHECK (id = 1)
);
