"""A local Azure AD for the tests of signing in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from casparian_flow.security import identity
from tests.security.azure_authority import Clock, StandIn, make_ca


@pytest.fixture(scope="session")
def private_keys() -> dict[str, rsa.RSAPrivateKey]:
    return {name: rsa.generate_private_key(65537, 2048) for name in ("first", "second")}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_ca(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What msal and our cache of keys take for the time."""
    clock = Clock()
    monkeypatch.setattr("msal.oauth2cli.oauth2.time", clock)
    # The expiry of a token is still compared with the real time, as PyJWT does.
    times = SimpleNamespace(monotonic=clock.monotonic, time=time.time)
    monkeypatch.setattr(identity, "time", times)
    return clock


@pytest.fixture
def unused(
    private_keys: dict[str, rsa.RSAPrivateKey], certificates: tuple[Path, Path], clock: Clock
) -> Iterator[StandIn]:
    """An authority that no variable names."""
    identity.authority_keys.cache_clear()  # a port may come twice
    running = StandIn(*certificates, private_keys)
    yield running
    running.stop()


@pytest.fixture
def azure(unused: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """An authority that stands in for Azure AD."""
    monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY", unused.url)
    monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY_CA", str(unused.ca))
    return unused
