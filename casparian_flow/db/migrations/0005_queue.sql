-- Deaths of the daemon counted against a job, and what is kept of an attempt as evidence. Frozen: a
-- later change is a later file.

ALTER TABLE cf_processing_queue ADD COLUMN crashes INTEGER DEFAULT 0 NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN fault VARCHAR DEFAULT '' NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN signal VARCHAR DEFAULT '' NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN exit_code INTEGER;

ALTER TABLE cf_attempt ADD COLUMN batches INTEGER DEFAULT 0 NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN rows INTEGER DEFAULT 0 NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN max_rss_bytes INTEGER DEFAULT 0 NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN cpu_seconds DOUBLE DEFAULT 0 NOT NULL;
