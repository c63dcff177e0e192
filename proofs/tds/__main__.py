"""The SQL Server sink over lines that are cut; docs/sinks_mssql.md says what that proves.

    python -m proofs.tds cuts --count 200 [--seed N] [--rows 500] [--provider mssql-odbc]

It exits with 1 when something is violated.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from proofs import arguments
from proofs.tds import driver
from proofs.tds.cuts import run


def main() -> None:
    parser = arguments.parser("tds", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    cuts = verbs.add_parser("cuts", help="publish while the line is cut at a random byte")
    cuts.add_argument("--count", type=int, default=200, help="publishes whose line is cut")
    arguments.add_seed(cuts)
    cuts.add_argument("--rows", type=int, default=500, help="of each output")
    cuts.add_argument("--provider", choices=driver.PROVIDERS, default="")
    options = parser.parse_args()
    provider = driver.choose(options.provider)
    if not provider:
        sys.exit("mssql-python is not installed: pip install 'casparian-flow[mssql]'")
    print(f"seed {options.seed}, {options.rows} rows an output, over {provider}")
    with tempfile.TemporaryDirectory() as folder:
        tally = run(Path(folder), options.count, options.seed, options.rows)
    print(tally.summary())
    sys.exit(1 if tally.violations else 0)


if __name__ == "__main__":
    main()
