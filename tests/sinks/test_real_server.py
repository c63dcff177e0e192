"""The contract of test_contract.py, held by a real SQL Server: see real_server.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sinks import test_contract
from tests.sinks.real_server import CONNECTION, RealPlace

if not CONNECTION:
    pytest.skip(
        "NO REAL SQL SERVER IS TESTED: that one's locks, transactions and types do what the sink "
        "builds on. Set CASPARIAN_TEST_MSSQL to the connection string of an empty database",
        allow_module_level=True,
    )

globals().update({n: test for n, test in vars(test_contract).items() if n.startswith("test_")})


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealPlace]:
    if getattr(request, "param", "mssql") != "mssql":
        pytest.skip("once is enough: this is not the sink of a folder")
    with RealPlace(CONNECTION, tmp_path).there() as there:
        yield there


modes = place
