"""Which outputs no reader is to see, though they were published: the sinks go by the same rule.

    forgotten   a person took them away in the sink
    retracted   a person took their rows back
    replaced    in mode replace, another output of the slot is greater by (ordinal, job id)

Who is greater takes the place when it is decided, before it is published: until it is, nothing is
claimed of the slot, since its sink may have either. It keeps the place when it is retracted.
"""

from __future__ import annotations

RETRACTED = "SELECT output_key FROM cf_retracted_output"

REPLACED = """
SELECT output_key FROM (
    SELECT output_key, row_number() OVER (
        PARTITION BY slot ORDER BY ordinal DESC, job_id DESC) AS place
    FROM (
        SELECT o.slot, v.ordinal, o.job_id, o.output_key
        FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        WHERE o.mode = 'replace' AND o.state <> 'REFUSED'
        UNION ALL
        SELECT f.slot, f.ordinal, f.job_id, f.output_key FROM cf_found_output f
        WHERE f.mode = 'replace'
        AND NOT EXISTS (SELECT 1 FROM cf_output o WHERE o.output_key = f.output_key
                        AND o.state <> 'REFUSED')
    )
) WHERE place > 1
"""

HIDDEN = f"""
SELECT output_key FROM cf_forgotten_output UNION ALL {RETRACTED} UNION ALL {REPLACED}
"""  # noqa: S608
"""The keys of all of them."""
