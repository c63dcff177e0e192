"""Ask a SQLite database: sqlite_ask.py DATABASE SQL"""

import sqlite3
import sys

if __name__ == "__main__":
    database, question = sys.argv[1:]
    print(sqlite3.connect(f"file:{database}?mode=ro", uri=True).execute(question).fetchall())
