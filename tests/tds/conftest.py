"""The driver, or a loud skip."""

from __future__ import annotations

import pytest

from proofs.tds import driver


@pytest.fixture(scope="session", autouse=True)
def provider() -> str:
    """Which half of mssql-python is in use."""
    chosen = driver.choose()
    if not chosen:
        pytest.skip("THE WIRE TO SQL SERVER IS NOT TESTED: mssql-python is not installed")
    return chosen
