"""Publishing where publishers sign in: the command line, the authority and the ledger together."""

from __future__ import annotations

import json

import pytest

from tests.commands import Casparian
from tests.plugs import ROWS
from tests.security.azure_authority import CLIENT, PERSON, TENANT, StandIn
from tests.security.conftest import azure, certificates, clock, private_keys, unused

__all__ = ["azure", "certificates", "clock", "private_keys", "unused"]


@pytest.fixture(autouse=True)
def tenant(own_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishers sign in."""
    monkeypatch.setenv("AZURE_TENANT_ID", TENANT)
    monkeypatch.setenv("AZURE_CLIENT_ID", CLIENT)


def test_a_publisher_signs_in_and_is_recorded(casparian: Casparian, azure: StandIn) -> None:
    azure.answers = ["authorization_pending", "authorization_pending"]
    done = casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    assert "enter the code ABCD-1234" in done.stderr
    assert f"signed in    as Ada Lovelace (object {PERSON})" in done.stderr
    (event,) = [e for e in casparian.json("audit", "show") if e["action"] == "publish"]
    assert event["actor"] == "Ada Lovelace"
    assert PERSON in json.dumps(event)
    assert casparian.out("plugins", "verify")


def test_who_declines_publishes_nothing(casparian: Casparian, azure: StandIn) -> None:
    azure.answers = ["authorization_declined"]
    file = casparian.plugin("rows", ROWS)
    assert "nothing was published" in casparian.err("publish", file, code=77)
    assert casparian.json("plugins") == []


@pytest.mark.parametrize("wrong", [{"tid": "another"}, {"aud": "another"}, {"exp": 1}])
def test_a_token_that_does_not_fit_publishes_nothing(
    casparian: Casparian, azure: StandIn, wrong: dict[str, object]
) -> None:
    issued = {"token_type": "Bearer", "access_token": azure.token(**wrong), "expires_in": 3600}
    azure.replaced["/oauth2/v2.0/token"] = (200, issued)
    casparian.err("publish", casparian.plugin("rows", ROWS), code=77)
    assert casparian.json("plugins") == []
