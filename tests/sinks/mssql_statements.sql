-- the first output of a topic

SET XACT_ABORT ON; SET NOCOUNT OFF; SET LANGUAGE us_english; SET LOCK_TIMEOUT 30000;

SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, @LockMode = 'Exclusive', @LockOwner = 'Transaction', @LockTimeout = ?; SELECT @given;

SELECT SCHEMA_NAME();

SELECT c.name, TYPE_NAME(c.system_type_id), c.max_length, c.precision, c.scale FROM sys.columns AS c WHERE c.object_id = OBJECT_ID(?) ORDER BY c.column_id;

CREATE TABLE [dbo].[_cf_outputs] ([id] bigint IDENTITY NOT NULL PRIMARY KEY, [output_key] nvarchar(64) COLLATE Latin1_General_BIN2 NOT NULL UNIQUE, [topic] nvarchar(400) COLLATE Latin1_General_BIN2 NOT NULL, [view_name] nvarchar(128) NOT NULL, [mode] nvarchar(10) NOT NULL, [state] nvarchar(10) NOT NULL, [rows] bigint NOT NULL, [digest] nvarchar(64) NOT NULL, [published_at] nvarchar(40) NOT NULL, [shown_at] nvarchar(40) NOT NULL, [hidden_at] nvarchar(40) NOT NULL, [job_id] bigint NULL, [file_version_id] bigint NULL, [source_hash] nvarchar(64) NULL, [plugin_version] nvarchar(255) NULL, [facts] nvarchar(max) NOT NULL, [table_number] bigint NOT NULL);

CREATE INDEX _cf_view ON [dbo].[_cf_outputs] (view_name, topic) INCLUDE (state, mode, file_version_id, job_id, source_hash, plugin_version);

CREATE INDEX _cf_table ON [dbo].[_cf_outputs] (view_name, table_number, state);

SELECT MIN(table_number) FROM [dbo].[_cf_outputs] WITH (READUNCOMMITTED) WHERE view_name = ? AND table_number > ?;

SELECT topic FROM [dbo].[_cf_outputs] WHERE view_name = ? AND topic <> ?;

SELECT OBJECT_ID(?);

CREATE TABLE [dbo].[_cf_rows_sales] (_cf_output bigint NOT NULL, [id] bigint NULL, [a ]]]] b] nvarchar(max) NULL);

CREATE INDEX _cf_output_of ON [dbo].[_cf_rows_sales] (_cf_output);

SELECT OBJECT_ID(?, 'V'), OBJECT_DEFINITION(OBJECT_ID(?, 'V'));

CREATE OR ALTER VIEW [dbo].[sales] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE (o.state = 'current' OR o.state = 'past' AND o.mode <> 'replace') AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_current] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state = 'current' AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_history] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state IN ('current', 'past') AND o.view_name = N'sales';

DROP TABLE IF EXISTS [dbo].[casparian_stage_tag-1-041627790ec4743be696bdccfb39e291];

CREATE TABLE [dbo].[casparian_stage_tag-1-041627790ec4743be696bdccfb39e291] ([id] bigint NULL, [a ]]]] b] nvarchar(max) NULL);

SELECT [id], [output_key], [topic], [view_name], [mode], [state], [rows], [digest], [published_at], [shown_at], [hidden_at], [job_id], [file_version_id], [source_hash], [plugin_version], [facts], [table_number] FROM [dbo].[_cf_outputs] WHERE [output_key] = ?;

INSERT INTO [dbo].[_cf_outputs] ([output_key], [topic], [view_name], [mode], [state], [rows], [digest], [published_at], [shown_at], [hidden_at], [job_id], [file_version_id], [source_hash], [plugin_version], [facts], [table_number]) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

SELECT [id] FROM [dbo].[_cf_outputs] WHERE [output_key] = ?;

INSERT INTO [dbo].[_cf_rows_sales] (_cf_output, [id], [a ]]]] b]) SELECT 1, s.[id], s.[a ]]]] b] FROM [dbo].[casparian_stage_tag-1-041627790ec4743be696bdccfb39e291] AS s;

UPDATE [dbo].[_cf_outputs] SET table_number = ? WHERE id = ?;

-- one with another column, that takes its place

ALTER TABLE [dbo].[_cf_rows_sales] ADD [more] float NULL;

CREATE OR ALTER VIEW [dbo].[sales] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], r.[more] AS [more], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE (o.state = 'current' OR o.state = 'past' AND o.mode <> 'replace') AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_current] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], r.[more] AS [more], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state = 'current' AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_history] AS SELECT r.[id] AS [id], r.[a ]]]] b] AS [a ]]]] b], r.[more] AS [more], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state IN ('current', 'past') AND o.view_name = N'sales';

DROP TABLE IF EXISTS [dbo].[casparian_stage_tag-2-d652a3aea5c4146be695ede7205b03c0];

CREATE TABLE [dbo].[casparian_stage_tag-2-d652a3aea5c4146be695ede7205b03c0] ([id] bigint NULL, [more] float NULL);

INSERT INTO [dbo].[_cf_rows_sales] (_cf_output, [id], [more]) SELECT 2, s.[id], s.[more] FROM [dbo].[casparian_stage_tag-2-d652a3aea5c4146be695ede7205b03c0] AS s;

UPDATE [dbo].[_cf_outputs] SET [state] = ?, [mode] = ?, [shown_at] = ?, [hidden_at] = ? WHERE id = ?;

-- one in mode error

DROP TABLE IF EXISTS [dbo].[casparian_stage_tag-3-a04d0c682b7885b821e5d6ab595649f7];

CREATE TABLE [dbo].[casparian_stage_tag-3-a04d0c682b7885b821e5d6ab595649f7] ([id] bigint NULL);

SELECT COUNT_BIG(*) FROM [dbo].[_cf_rows_sales] AS r LEFT JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.id IS NULL OR o.facts = '';

INSERT INTO [dbo].[_cf_rows_sales] (_cf_output, [id]) SELECT 3, s.[id] FROM [dbo].[casparian_stage_tag-3-a04d0c682b7885b821e5d6ab595649f7] AS s;

-- another version is shown

-- one is deleted

DELETE FROM [dbo].[_cf_rows_sales] WHERE _cf_output = ?;

DELETE FROM [dbo].[_cf_outputs] WHERE id = ?;

-- what is there is compared with the ledger

SELECT _cf_output, COUNT_BIG(*) FROM [dbo].[_cf_rows_sales] GROUP BY _cf_output;

SELECT MAX(id) FROM [dbo].[_cf_outputs];

SELECT [id], [output_key], [topic], [view_name], [mode], [state], [rows], [digest], [published_at], [shown_at], [hidden_at], [job_id], [file_version_id], [source_hash], [plugin_version], [facts], [table_number] FROM [dbo].[_cf_outputs] WHERE id > ? AND id <= ?;

-- the records are listed

-- stage tables of the dead are dropped

SELECT t.name FROM sys.tables AS t WHERE t.schema_id = SCHEMA_ID(?) AND LEFT(t.name, ?) = ? ORDER BY t.name;

DROP TABLE IF EXISTS [dbo].[casparian_stage_tag-4-8fa03f894ee529bfea1e7128f0fa651a];

-- tables of an earlier release are converted

SELECT [output_key], [table_name], [topic], [job_id], [file_version_id], [source_hash], [plugin_version], [rows], [digest], [slot], [ordinal], [mode], [state], [published_at], [facts] FROM [dbo].[_cf_outputs];

SELECT _cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version, COUNT_BIG(*) FROM [dbo].[sales] GROUP BY _cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version;

EXEC sp_rename @objname = ?, @newname = ?;

DROP TABLE [dbo].[_cf_outputs_earlier];

ALTER TABLE [dbo].[_cf_rows_sales] ADD _cf_output bigint NULL;

SELECT p.state_desc, p.permission_name, USER_NAME(p.grantee_principal_id) FROM sys.database_permissions AS p WHERE p.class = 1 AND p.major_id = OBJECT_ID(?);

SELECT _cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version, COUNT_BIG(*) FROM [dbo].[_cf_rows_sales] WHERE _cf_output IS NULL GROUP BY _cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version;

UPDATE [dbo].[_cf_rows_sales] SET _cf_output = ? WHERE _cf_output IS NULL AND _cf_file_version_id = ? AND _cf_job_id = ? AND _cf_source_hash = ? AND _cf_plugin_version = ?;

INSERT INTO [dbo].[_cf_rows_sales] ([id], [name], [_cf_file_version_id], [_cf_job_id], [_cf_source_hash], [_cf_plugin_version]) SELECT [id], [name], [_cf_file_version_id], [_cf_job_id], [_cf_source_hash], [_cf_plugin_version] FROM [dbo].[_cf_retracted_sales];

DROP TABLE [dbo].[_cf_retracted_sales];

ALTER TABLE [dbo].[_cf_rows_sales] ALTER COLUMN _cf_output bigint NOT NULL;

DROP INDEX IF EXISTS _cf_job ON [dbo].[_cf_rows_sales];

CREATE OR ALTER VIEW [dbo].[sales] AS SELECT r.[id] AS [id], r.[name] AS [name], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE (o.state = 'current' OR o.state = 'past' AND o.mode <> 'replace') AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_current] AS SELECT r.[id] AS [id], r.[name] AS [name], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state = 'current' AND o.view_name = N'sales';

CREATE OR ALTER VIEW [dbo].[sales_history] AS SELECT r.[id] AS [id], r.[name] AS [name], o.[file_version_id] AS [_cf_file_version_id], o.[job_id] AS [_cf_job_id], o.[source_hash] AS [_cf_source_hash], o.[plugin_version] AS [_cf_plugin_version] FROM [dbo].[_cf_rows_sales] AS r JOIN [dbo].[_cf_outputs] AS o ON o.id = r._cf_output WHERE o.state IN ('current', 'past') AND o.view_name = N'sales';
