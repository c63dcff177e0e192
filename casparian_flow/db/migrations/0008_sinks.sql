-- Modes, and what a person retracts. Frozen: a later change is a later file.

ALTER TABLE cf_output ADD COLUMN slot VARCHAR DEFAULT '' NOT NULL;

CREATE INDEX ix_cf_output_slot ON cf_output (slot);

ALTER TABLE cf_found_output ADD COLUMN mode VARCHAR DEFAULT 'append' NOT NULL;

ALTER TABLE cf_found_output ADD COLUMN slot VARCHAR DEFAULT '' NOT NULL;

CREATE TABLE cf_retracted_output (
    output_key VARCHAR NOT NULL, 
    state VARCHAR NOT NULL, 
    retracted_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_retracted_output PRIMARY KEY (output_key), 
    CONSTRAINT ck_cf_retracted_output_state CHECK (state IN ('RETRACTING', 'RETRACTED', 'REINSTATING'))
);
