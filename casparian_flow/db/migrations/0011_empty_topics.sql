-- Topics that a file may give nothing but rejects, as a person said. Frozen: a later change is a
-- later file.

CREATE TABLE cf_empty_topic (
    plugin_name VARCHAR NOT NULL, 
    topic_name VARCHAR NOT NULL, 
    allowed_at DATETIME NOT NULL, 
    CONSTRAINT pk_cf_empty_topic PRIMARY KEY (plugin_name, topic_name)
);
