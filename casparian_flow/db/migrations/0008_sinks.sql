-- Modes: what the outputs of a location's versions share. Frozen: a later change is a later file.

ALTER TABLE cf_output ADD COLUMN slot VARCHAR DEFAULT '' NOT NULL;

CREATE INDEX ix_cf_output_slot ON cf_output (slot);
