-- Files that are still being written, and since when. Frozen: a later change is a later file.

CREATE TABLE cf_unsettled (
    source_root_id INTEGER NOT NULL, 
    path BLOB NOT NULL, 
    first_seen DOUBLE NOT NULL, 
    CONSTRAINT pk_cf_unsettled PRIMARY KEY (source_root_id, path), 
    CONSTRAINT fk_cf_unsettled_source_root_id FOREIGN KEY(source_root_id) REFERENCES cf_source_root (id)
);
