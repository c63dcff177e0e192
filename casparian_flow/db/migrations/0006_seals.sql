-- Seals of rows in the audit; what is there already is sealed with this migration. Frozen: a later
-- change is a later file.

CREATE INDEX ix_cf_audit_seal ON cf_audit (seq) WHERE action = 'seal';
