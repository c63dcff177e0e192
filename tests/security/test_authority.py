"""An authority's keys, its certificate, and what the environment and the settings may say of it."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import config
from casparian_flow.config import AzureSettings
from casparian_flow.errors import AuthError, ConfigError
from casparian_flow.security import identity
from casparian_flow.security.identity import sign_in, validate
from tests.conftest import write_config
from tests.security.azure_authority import (
    AZURE,
    CLIENT,
    KEYS,
    OTHER,
    PERSON,
    TENANT,
    Clock,
    StandIn,
    make_ca,
    quiet,
)

# The authority's keys


def test_keys_are_fetched_once(azure: StandIn) -> None:
    for _ in range(3):
        validate(AZURE, azure.token())
    assert azure.visits(KEYS) == 1


def test_a_new_key_is_found(azure: StandIn) -> None:
    validate(AZURE, azure.token())
    azure.published = ["first", "second"]
    assert validate(AZURE, azure.token("second")).object_id == PERSON
    azure.published = ["second"]
    validate(AZURE, azure.token("second"))
    assert azure.visits(KEYS) == 2


def test_a_withdrawn_key_is_forgotten(
    azure: StandIn, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate(AZURE, azure.token())
    azure.published = ["second"]
    clock.sleep(identity.KEYS_LAST)
    with pytest.raises(AuthError, match="key first, which is not the tenant's"):
        validate(AZURE, azure.token())


def test_a_flood_of_unknown_keys_does_not_reach_the_authority(
    azure: StandIn, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refused(number: int) -> bool:
        with pytest.raises(AuthError, match="which is not the tenant's"):
            validate(AZURE, azure.token(header={"kid": f"unknown-{number}"}))
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(refused, range(40)))
    assert azure.visits(KEYS) == 2
    validate(AZURE, azure.token())
    clock.sleep(identity.KEYS_PAUSE)
    azure.published = ["second"]
    validate(AZURE, azure.token("second"))
    assert azure.visits(KEYS) == 3


@pytest.mark.parametrize(
    ("status", "body"), [(200, {}), (200, {"keys": []}), (200, {"keys": 1}), (500, {}), (404, {})]
)
def test_without_keys_nothing_is_believed(azure: StandIn, status: int, body: Any) -> None:
    azure.replaced[KEYS] = (status, body)
    with pytest.raises(AuthError, match=r"cannot check the sign-in .* nothing was deployed"):
        validate(AZURE, azure.token())
    del azure.replaced[KEYS]
    validate(AZURE, azure.token())


def test_an_authority_that_is_not_there(azure: StandIn) -> None:
    token = azure.token()
    azure.stop()
    with pytest.raises(AuthError, match=r"cannot be reached \(.*Connection refused") as caught:
        sign_in(AZURE, quiet)
    assert "HTTPS_PROXY" in caught.value.hint
    with pytest.raises(AuthError, match=r"cannot check .*; nothing was deployed"):
        validate(AZURE, token)


def test_an_authority_that_says_nothing(azure: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_TIMEOUT", (0.1, 0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY", url)
        with pytest.raises(AuthError, match=r"cannot be reached \(.*timed out"):
            sign_in(AZURE, quiet)
        with pytest.raises(AuthError, match=r"cannot check .*timed out"):
            validate(AZURE, azure.token())


# TLS and the environment


def test_an_untrusted_ca_is_refused(
    azure: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_ca, _ = make_ca(tmp_path)
    monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY_CA", str(other_ca))
    with pytest.raises(AuthError, match=r"certificate .*\(.*CERTIFICATE_VERIFY_FAILED"):
        sign_in(AZURE, quiet)
    with pytest.raises(AuthError, match=r"cannot check .*certificate"):
        validate(AZURE, azure.token())
    assert azure.seen == []


def test_a_test_ignores_the_machines_ca_and_proxy(
    azure: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, "/not/there.pem")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    validate(AZURE, sign_in(AZURE, quiet))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"CASPARIAN_TEST_AUTHORITY is set: {azure.url} stands in for Azure AD"] * 2


def test_otherwise_the_machines_ca_and_proxy_count(
    unused: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "AZURE_AD", unused.url)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(unused.ca))
    validate(AZURE, sign_in(AZURE, quiet))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/not/there.pem")
    with pytest.raises(AuthError, match=r"/not/there\.pem") as caught:
        sign_in(AZURE, quiet)
    assert "REQUESTS_CA_BUNDLE" in caught.value.hint
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(unused.ca))
    with pytest.raises(AuthError, match="cannot be reached"):
        sign_in(AZURE, quiet)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8443",
        "https://login.microsoftonline.com",
        "https://localhost.example.com",
        "https://localhost@example.com",
        "https://example.com\\@localhost",
        "https://example.com#@localhost",
        "https://localhost:8443/path",
        "https://localhost:8443\n",
        "localhost:8443",
    ],
)
def test_only_this_machine_stands_in(
    url: str, azure: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY", url)
    for use in (lambda: sign_in(AZURE, quiet), lambda: validate(AZURE, azure.token())):
        with pytest.raises(ConfigError, match="not an address of this machine") as caught:
            use()
        assert caught.value.hint == "unset CASPARIAN_TEST_AUTHORITY"


@pytest.mark.parametrize("ca", ["", "/not/there.pem"])
def test_a_stand_in_needs_its_ca(ca: str, azure: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASPARIAN_TEST_AUTHORITY_CA", ca)
    with pytest.raises(ConfigError, match="is not a file"):
        sign_in(AZURE, quiet)


# Settings


@pytest.mark.parametrize("name", ["tenant_id", "client_id"])
@pytest.mark.parametrize("text", ["common", "organizations", "example.com", f"{{{TENANT}}}", " "])
def test_ids_are_guids(name: str, text: str, tmp_path: Path) -> None:
    ids = {"tenant_id": TENANT, "client_id": CLIENT, name: text}
    with pytest.raises(ConfigError, match="is not a GUID"):
        AzureSettings(**ids)
    lines = "\n".join(f'{key} = "{value}"' for key, value in ids.items())
    with pytest.raises(ConfigError, match="is not a GUID"):
        write_config(tmp_path, f"[azure]\n{lines}\n")


def test_publishers_are_guids() -> None:
    with pytest.raises(ConfigError, match=r"publisher 'ada@example\.com' is not a GUID"):
        AzureSettings(publishers=[PERSON, "ada@example.com"])


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path, f'[azure]\ntenant_id = "{OTHER}"\nclient_id = "{OTHER}"\n')
    monkeypatch.setenv("AZURE_TENANT_ID", TENANT.upper())
    monkeypatch.setenv("AZURE_CLIENT_ID", CLIENT)
    file = str(tmp_path / config.FILE_NAME)
    assert config.load(file).azure == AZURE
    monkeypatch.setenv("AZURE_TENANT_ID", "common")
    with pytest.raises(ConfigError, match="'common' is not a GUID"):
        config.load(file)


def test_missing_packages_are_named(azure: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    token = azure.token()
    uses = {"msal": lambda: sign_in(AZURE, quiet), "jwt": lambda: validate(AZURE, token)}
    for package, use in uses.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(AuthError, match=f"{package} is not installed") as caught:
                use()
        assert caught.value.hint == "pip install 'casparian-flow[azure]'"
