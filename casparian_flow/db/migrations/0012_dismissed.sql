-- Failures that a person has accepted. Frozen: a later change is a later file.

CREATE TABLE cf_dismissed_failure (
    job_id INTEGER NOT NULL, 
    fence INTEGER NOT NULL, 
    dismissed_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_dismissed_failure PRIMARY KEY (job_id), 
    CONSTRAINT fk_cf_dismissed_failure_job_id FOREIGN KEY(job_id) REFERENCES cf_processing_queue (id)
);
