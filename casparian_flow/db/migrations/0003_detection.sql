-- What a source root waits for, how it is watched, and what its scans and scrubs found. Frozen: a
-- later change is a later file.

ALTER TABLE cf_source_root ADD COLUMN done_file VARCHAR DEFAULT '' NOT NULL;

ALTER TABLE cf_source_root ADD COLUMN min_age_seconds DOUBLE DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN waiting INTEGER DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN held INTEGER DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN held_since DOUBLE DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN watch VARCHAR DEFAULT '' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN missed INTEGER DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN scrub_after INTEGER DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN scrubbed DOUBLE DEFAULT '0' NOT NULL;

ALTER TABLE cf_scan_state ADD COLUMN hidden INTEGER DEFAULT '0' NOT NULL;
