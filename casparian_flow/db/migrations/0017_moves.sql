-- Where the files that are gone have gone to. Frozen: a later change is a later file.

-- The version that a location had when its file was found gone, and what that file is now. `due`: the
-- next scan looks for it.

CREATE TABLE cf_gone_version (
    file_version_id INTEGER NOT NULL, 
    content_hash VARCHAR NOT NULL, 
    to_version_id INTEGER, 
    due BOOLEAN DEFAULT 1 NOT NULL, 
    found_at DATETIME, 
    CONSTRAINT pk_cf_gone_version PRIMARY KEY (file_version_id), 
    CONSTRAINT ck_cf_gone_version_moved CHECK ((to_version_id IS NULL) = (found_at IS NULL)), 
    CONSTRAINT fk_cf_gone_version_file_version_id FOREIGN KEY(file_version_id) REFERENCES cf_file_version (id), 
    CONSTRAINT fk_cf_gone_version_to_version_id FOREIGN KEY(to_version_id) REFERENCES cf_file_version (id)
);

CREATE INDEX ix_cf_gone_version_content ON cf_gone_version (content_hash) WHERE to_version_id IS NULL;

CREATE INDEX ix_cf_gone_version_due ON cf_gone_version (file_version_id) WHERE due;

CREATE INDEX ix_cf_gone_version_moved ON cf_gone_version (to_version_id) WHERE to_version_id IS NOT NULL;

-- A file that moved is found by these. Files of one folder have numbers and times near each other,
-- so that both are written in few places, as an index of contents would not be.

CREATE INDEX ix_cf_file_location_inode ON cf_file_location (inode);

CREATE INDEX ix_cf_file_location_mtime_ns ON cf_file_location (mtime_ns);

INSERT INTO cf_gone_version (file_version_id, content_hash)
SELECT v.id, v.content_hash
FROM cf_file_location l JOIN cf_file_version v ON v.id = l.current_version_id
WHERE l.gone_at IS NOT NULL AND v.size_bytes > 0 AND l.problem NOT LIKE 'not deleted: %';
