-- begin_session
SET XACT_ABORT ON; SET NOCOUNT OFF; SET LANGUAGE us_english; SET LOCK_TIMEOUT 30000;

-- default_schema
SELECT SCHEMA_NAME();

-- lock
-- ? = ('casparian:<output key>', 30000)
SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, @LockMode = 'Exclusive', @LockOwner = 'Transaction', @LockTimeout = ?; SELECT @given;

-- lock, of a session
-- ? = ('casparian_stage_x', 0)
SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, @LockMode = 'Exclusive', @LockOwner = 'Session', @LockTimeout = ?; SELECT @given;

-- unlock
-- ? = ('casparian_stage_x',)
EXEC sp_releaseapplock @Resource = ?, @LockOwner = 'Session';

-- columns
-- ? = ('[dbo].[sales]',)
SELECT c.name, TYPE_NAME(c.system_type_id), c.max_length, c.precision, c.scale FROM sys.columns AS c WHERE c.object_id = OBJECT_ID(?, 'U') ORDER BY c.column_id;

-- stage_tables
-- ? = ('dbo', 25, 'casparian_stage_0a1b2c3d-')
SELECT t.name FROM sys.tables AS t WHERE t.schema_id = SCHEMA_ID(?) AND LEFT(t.name, ?) = ? ORDER BY t.name;

-- create
CREATE TABLE [dbo].[sales] (
	[id] bigint NULL,
	[a ]]]] b] nvarchar(max) NULL,
	[_cf_file_version_id] bigint NULL,
	[_cf_job_id] bigint NULL,
	[_cf_source_hash] nvarchar(64) NULL,
	[_cf_plugin_version] nvarchar(255) NULL
);

-- create
CREATE INDEX _cf_job ON [dbo].[sales] ([_cf_job_id]);

-- create_stage
CREATE TABLE [dbo].[casparian_stage_x] (
	[id] bigint NULL,
	[a ]]]] b] nvarchar(max) NULL
);

-- drop
DROP TABLE IF EXISTS [dbo].[casparian_stage_x];

-- add_columns
ALTER TABLE [dbo].[sales] ADD [id] bigint NULL, [a ]]]] b] nvarchar(max) NULL;

-- create_ledger
CREATE TABLE [dbo]._cf_outputs (
	output_key CHAR(64) COLLATE Latin1_General_BIN2 NOT NULL,
	table_name NVARCHAR(128) NOT NULL,
	topic NVARCHAR(400) COLLATE Latin1_General_BIN2 NOT NULL,
	job_id BIGINT NOT NULL,
	file_version_id BIGINT NOT NULL,
	source_hash NVARCHAR(64) NOT NULL,
	plugin_version NVARCHAR(255) NOT NULL,
	rows BIGINT NOT NULL,
	digest CHAR(64) NOT NULL,
	slot CHAR(64) COLLATE Latin1_General_BIN2 NOT NULL,
	ordinal INTEGER NOT NULL,
	mode NVARCHAR(10) NOT NULL,
	state NVARCHAR(10) NOT NULL,
	published_at DATETIME NOT NULL DEFAULT sysutcdatetime(),
	facts NVARCHAR(max) NOT NULL,
	PRIMARY KEY (output_key)
);

-- create_ledger
CREATE INDEX _cf_slot ON [dbo]._cf_outputs (slot);

-- create_ledger
CREATE INDEX _cf_table ON [dbo]._cf_outputs (table_name, topic);

-- recorded
-- ? = ('<output key>',)
SELECT o.output_key, o.topic, o.rows, o.digest, o.mode, o.state, o.slot, o.ordinal, o.file_version_id, o.job_id, o.source_hash, o.plugin_version, o.facts
FROM [dbo]._cf_outputs AS o
WHERE o.output_key = ?;

-- in_table
-- ? = ('sales',)
SELECT o.output_key, o.topic, o.rows, o.digest, o.mode, o.state, o.slot, o.ordinal, o.file_version_id, o.job_id, o.source_hash, o.plugin_version, o.facts
FROM [dbo]._cf_outputs AS o
WHERE o.table_name = ?;

-- in_slot
-- ? = ('sales', '<slot>', 'replace')
SELECT o.output_key, o.topic, o.rows, o.digest, o.mode, o.state, o.slot, o.ordinal, o.file_version_id, o.job_id, o.source_hash, o.plugin_version, o.facts
FROM [dbo]._cf_outputs AS o
WHERE o.table_name = ? AND o.slot = ? AND o.mode = ?;

-- others
-- ? = ('sales', 'sales')
SELECT o.topic
FROM [dbo]._cf_outputs AS o
WHERE o.table_name = ? AND (o.topic <> ?);

-- record
-- ? = ('<output key>', 'sales', 'sales', 'shown')
INSERT INTO [dbo]._cf_outputs (output_key, table_name, topic, state) VALUES (?, ?, ?, ?);

-- mark
-- ? = ('replaced', '<output key>')
UPDATE [dbo]._cf_outputs SET state=? WHERE [dbo]._cf_outputs.output_key = ?;

-- forget
-- ? = ('<output key>',)
DELETE FROM [dbo]._cf_outputs WHERE [dbo]._cf_outputs.output_key = ?;

-- insert_staged
INSERT INTO [dbo].[sales] ([id], [a ]]]] b], [_cf_file_version_id], [_cf_job_id], [_cf_source_hash], [_cf_plugin_version]) SELECT r.[id], r.[a ]]]] b], r.[_cf_file_version_id], r.[_cf_job_id], r.[_cf_source_hash], r.[_cf_plugin_version]
FROM [dbo].[casparian_stage_x] AS r;

-- delete_rows
-- ? = (101, 7, '<source hash>', '1.2.3')
DELETE FROM [dbo].[sales] WHERE [dbo].[sales].[_cf_file_version_id] = ? AND [dbo].[sales].[_cf_job_id] = ? AND [dbo].[sales].[_cf_source_hash] = ? AND [dbo].[sales].[_cf_plugin_version] = ?;

-- move_out
-- ? = (101, 7, '<source hash>', '1.2.3')
INSERT INTO [dbo].[_cf_retracted_sales] ([id], [a ]]]] b], [_cf_file_version_id], [_cf_job_id], [_cf_source_hash], [_cf_plugin_version]) SELECT r.[id], r.[a ]]]] b], r.[_cf_file_version_id], r.[_cf_job_id], r.[_cf_source_hash], r.[_cf_plugin_version]
FROM [dbo].[sales] AS r
WHERE r.[_cf_file_version_id] = ? AND r.[_cf_job_id] = ? AND r.[_cf_source_hash] = ? AND r.[_cf_plugin_version] = ?;

-- move_out
-- ? = (101, 7, '<source hash>', '1.2.3')
DELETE FROM [dbo].[sales] WHERE [dbo].[sales].[_cf_file_version_id] = ? AND [dbo].[sales].[_cf_job_id] = ? AND [dbo].[sales].[_cf_source_hash] = ? AND [dbo].[sales].[_cf_plugin_version] = ?;

-- move_back
-- ? = (101, 7, '<source hash>', '1.2.3')
INSERT INTO [dbo].[sales] ([id], [a ]]]] b], [_cf_file_version_id], [_cf_job_id], [_cf_source_hash], [_cf_plugin_version]) SELECT r.[id], r.[a ]]]] b], r.[_cf_file_version_id], r.[_cf_job_id], r.[_cf_source_hash], r.[_cf_plugin_version]
FROM [dbo].[_cf_retracted_sales] AS r
WHERE r.[_cf_file_version_id] = ? AND r.[_cf_job_id] = ? AND r.[_cf_source_hash] = ? AND r.[_cf_plugin_version] = ?;

-- move_back
-- ? = (101, 7, '<source hash>', '1.2.3')
DELETE FROM [dbo].[_cf_retracted_sales] WHERE [dbo].[_cf_retracted_sales].[_cf_file_version_id] = ? AND [dbo].[_cf_retracted_sales].[_cf_job_id] = ? AND [dbo].[_cf_retracted_sales].[_cf_source_hash] = ? AND [dbo].[_cf_retracted_sales].[_cf_plugin_version] = ?;

-- delete_retracted
-- ? = (101, 7, '<source hash>', '1.2.3')
DELETE FROM [dbo].[_cf_retracted_sales] WHERE [dbo].[_cf_retracted_sales].[_cf_file_version_id] = ? AND [dbo].[_cf_retracted_sales].[_cf_job_id] = ? AND [dbo].[_cf_retracted_sales].[_cf_source_hash] = ? AND [dbo].[_cf_retracted_sales].[_cf_plugin_version] = ?;

-- counts
SELECT r.[_cf_file_version_id], r.[_cf_job_id], r.[_cf_source_hash], r.[_cf_plugin_version], count_big(*) AS there
FROM [dbo].[sales] AS r GROUP BY r.[_cf_file_version_id], r.[_cf_job_id], r.[_cf_source_hash], r.[_cf_plugin_version];
