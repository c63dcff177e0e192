-- The bytes of versions are kept by default, small ones in rows of a SQLite file of the store. Frozen:
-- a later change is a later file.

CREATE TABLE cf_kept_content (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    content_hash VARCHAR NOT NULL, 
    size_bytes INTEGER NOT NULL, 
    in_file BOOLEAN NOT NULL, 
    kept_at DATETIME NOT NULL, 
    CONSTRAINT ck_cf_kept_content_content_hash CHECK (length(content_hash) = 64), 
    CONSTRAINT ck_cf_kept_content_size_bytes CHECK (size_bytes >= 0), 
    CONSTRAINT uq_cf_kept_content_content_hash UNIQUE (content_hash)
);

INSERT INTO cf_kept_content (content_hash, size_bytes, in_file, kept_at)
SELECT content_hash, size_bytes, 1, kept_at FROM cf_snapshot ORDER BY kept_at, rowid;

CREATE TABLE cf_evicted_content (
    content_hash VARCHAR NOT NULL, 
    evicted_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_evicted_content PRIMARY KEY (content_hash)
);

CREATE TABLE cf_store (
    id INTEGER NOT NULL, 
    contents INTEGER NOT NULL, 
    bytes INTEGER NOT NULL, 
    fault VARCHAR NOT NULL, 
    missed INTEGER NOT NULL, 
    since DATETIME NOT NULL, 
    CONSTRAINT pk_cf_store PRIMARY KEY (id), 
    CONSTRAINT ck_cf_store_single CHECK (id = 1)
);

INSERT INTO cf_store (id, contents, bytes, fault, missed, since)
SELECT 1, count(*), coalesce(sum(size_bytes), 0), '', 0, datetime('now') FROM cf_kept_content;

DROP TABLE cf_snapshot;

DROP TABLE cf_snapshot_fault;
