-- Signed statements, trust, and the sandbox each attempt ran under. Frozen: a later change is a
-- later file.

ALTER TABLE cf_plugin ADD COLUMN statement BLOB;

ALTER TABLE cf_plugin ADD COLUMN verdict VARCHAR DEFAULT '' NOT NULL;

ALTER TABLE cf_attempt ADD COLUMN sandbox VARCHAR DEFAULT '' NOT NULL;

CREATE TABLE cf_trust_statement (
    seq INTEGER NOT NULL, 
    kind VARCHAR NOT NULL, 
    payload BLOB NOT NULL, 
    public_key BLOB NOT NULL, 
    signature BLOB NOT NULL, 
    countersignature BLOB NOT NULL, 
    CONSTRAINT pk_cf_trust_statement PRIMARY KEY (seq)
);

CREATE INDEX ix_cf_audit_trust ON cf_audit (seq)
WHERE action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable');

CREATE TABLE cf_ledger_identity (
    id VARCHAR NOT NULL, 
    CONSTRAINT pk_cf_ledger_identity PRIMARY KEY (id)
);

INSERT INTO cf_ledger_identity (id) VALUES (lower(hex(randomblob(16))));

CREATE TRIGGER cf_trust_statement_no_update BEFORE UPDATE ON cf_trust_statement
BEGIN SELECT RAISE(ABORT, 'a trust statement is never changed'); END;

CREATE TRIGGER cf_trust_statement_no_delete BEFORE DELETE ON cf_trust_statement
BEGIN SELECT RAISE(ABORT, 'a trust statement is never deleted'); END;

CREATE TRIGGER cf_ledger_identity_no_update BEFORE UPDATE ON cf_ledger_identity
BEGIN SELECT RAISE(ABORT, 'a ledger keeps its identity'); END;

CREATE TRIGGER cf_ledger_identity_no_delete BEFORE DELETE ON cf_ledger_identity
BEGIN SELECT RAISE(ABORT, 'a ledger keeps its identity'); END;
