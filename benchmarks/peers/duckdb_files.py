"""Ask DuckDB about the Parquet files of a folder: duckdb_files.py FOLDER SQL-OVER-files"""

import sys

import duckdb

if __name__ == "__main__":
    folder, question = sys.argv[1:]
    duckdb.sql(
        f"CREATE VIEW files AS SELECT * FROM read_parquet('{folder}/*.parquet', union_by_name=true)"
    )
    print(duckdb.sql(question).fetchall())
