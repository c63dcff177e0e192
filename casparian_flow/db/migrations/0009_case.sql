-- Whether a rule matches in any case. Rules there are keep their meaning. Frozen: a later change is
-- a later file.

ALTER TABLE cf_routing_rule ADD COLUMN any_case BOOLEAN DEFAULT 0 NOT NULL;
