"""Who signs in to Azure AD, and which tokens are believed, over real TLS."""

from __future__ import annotations

import base64
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow.config import AzureSettings
from casparian_flow.errors import AuthError
from casparian_flow.security.identity import AzureUser, sign_in, validate
from tests.security.azure_authority import (
    AZURE,
    CLIENT,
    DEVICE,
    DEVICE_CODE,
    DISCOVERY,
    KEYS,
    OTHER,
    PERSON,
    TENANT,
    TOKEN,
    Clock,
    StandIn,
    encoded,
    forged,
    quiet,
)

# Signing in


def test_a_person_signs_in_and_the_sentinel_knows_them(azure: StandIn, clock: Clock) -> None:
    azure.answers = ["authorization_pending", "authorization_pending"]
    said: list[str] = []
    token = sign_in(AZURE, said.append)
    assert validate(AZURE, token) == AzureUser(
        tenant=TENANT,
        object_id=PERSON,
        issuer=f"{azure.url}/{TENANT}/v2.0",
        name="Ada Lovelace",
    )
    text = "\n".join(said)
    for must in ("https://login.example/device", "ABCD-1234", TENANT, CLIENT, "15 min"):
        assert must in text
    assert "never enter a code you did not start" in text
    assert azure.visits(TOKEN) == 3
    assert clock.slept == 2


def test_only_our_scope_is_asked_for_and_no_refresh_token(azure: StandIn) -> None:
    sign_in(AZURE, quiet)
    (form,) = [form for endpoint, form in azure.seen if endpoint == DEVICE]
    scopes = set(form["scope"].split())
    assert f"api://{CLIENT}/publish" in scopes
    assert scopes - {f"api://{CLIENT}/publish"} == {"openid", "profile"}  # msal's own
    assert form["client_id"] == CLIENT


def test_slow_down_is_heeded(azure: StandIn, clock: Clock) -> None:
    azure.answers = ["slow_down", "authorization_pending"]
    sign_in(AZURE, quiet)
    assert clock.slept == 2 * (1 + 5)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("authorization_declined", "declined in the browser"),
        ("access_denied", "declined in the browser"),
        ("expired_token", "code expired"),
        ("bad_verification_code", "the code"),
        ("invalid_client", "does not let this application sign in"),
        ("invalid_grant", "refused the sign-in: invalid_grant: AADSTS7: invalid_grant;"),
    ],
)
def test_what_azure_refuses_is_said_in_words(azure: StandIn, error: str, words: str) -> None:
    azure.answers = ["authorization_pending", error]
    with pytest.raises(AuthError, match=words) as caught:
        sign_in(AZURE, quiet)
    assert "nothing was published" in caught.value.message
    assert caught.value.hint
    assert "Trace" not in caught.value.message


def test_a_code_nobody_enters_expires_here_too(azure: StandIn, clock: Clock) -> None:
    azure.replaced[DEVICE] = (200, {**DEVICE_CODE, "expires_in": 10})
    azure.answers = ["authorization_pending"] * 100
    with pytest.raises(AuthError, match="code expired"):
        sign_in(AZURE, quiet)
    assert clock.slept <= 12


def test_a_refused_device_code_is_said_in_words(azure: StandIn) -> None:
    azure.replaced[DEVICE] = (400, {"error": "invalid_scope", "error_description": "AADSTS70011"})
    with pytest.raises(AuthError, match="invalid_scope: AADSTS70011"):
        sign_in(AZURE, quiet)


@pytest.mark.parametrize(
    ("endpoint", "status", "body", "words"),
    [
        (DISCOVERY, 400, {"error": "invalid_tenant"}, "HTTP 400, invalid_tenant"),
        (DISCOVERY, 503, b"<html>", "HTTP 503"),
        (DISCOVERY, 302, {}, "HTTP 302"),
        (DISCOVERY, 200, {}, "authorization_endpoint"),
        (DEVICE, 200, [], "HTTP 200"),
        (DEVICE, 200, {**DEVICE_CODE, "interval": "soon"}, "soon"),
        (TOKEN, 503, {"error": "later"}, "HTTP 503"),
        (TOKEN, 307, {"error": "elsewhere"}, "HTTP 307"),
    ],
)
def test_an_answer_of_no_use_is_said_in_words(
    azure: StandIn, endpoint: str, status: int, body: Any, words: str
) -> None:
    azure.replaced[endpoint] = (status, body)
    with pytest.raises(AuthError, match=words) as caught:
        sign_in(AZURE, quiet)
    assert caught.value.message.startswith(f"cannot sign in at {azure.url}: ")
    assert azure.visits("/elsewhere") == 0


def test_an_authority_cannot_send_us_to_plain_http(azure: StandIn) -> None:
    _, usual = azure.answer(DISCOVERY)
    plain = usual["device_authorization_endpoint"].replace("https:", "http:")
    azure.replaced[DISCOVERY] = (200, {**usual, "device_authorization_endpoint": plain})
    with pytest.raises(AuthError, match="No connection adapters"):
        sign_in(AZURE, quiet)


@pytest.fixture
def heard() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored, the suite too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_ends_it(azure: StandIn, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    azure.answers = ["authorization_pending"] * 100
    monkeypatch.setattr(clock, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sign_in(AZURE, quiet)
    assert azure.visits(TOKEN) == 1


def test_what_the_authority_says_cannot_steer_the_terminal(azure: StandIn) -> None:
    azure.replaced[DEVICE] = (200, {**DEVICE_CODE, "user_code": "\x1b[2JAB\n" + "C" * 9999})
    said: list[str] = []
    sign_in(AZURE, said.append)
    assert all(line.isprintable() and len(line) < 500 for line in said)


# Secrets


def test_the_token_is_not_logged(
    azure: StandIn, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        token = sign_in(AZURE, quiet)
        validate(AZURE, token)
        with pytest.raises(AuthError) as caught:
            validate(AZURE, f"{token}x")
    out, err = capfd.readouterr()
    everything = "".join([caplog.text, out, err, str(caught.value), caught.value.hint])
    assert TOKEN in caplog.text  # requests are logged, so there was something to find
    for secret in [token, *token.split(".")[1:]]:
        assert secret not in everything


def test_a_token_in_a_broken_answer_is_not_logged(
    azure: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    azure.replaced[TOKEN] = (200, b'{"access_token": "the.secret.token"')
    with caplog.at_level(logging.DEBUG), pytest.raises(AuthError) as caught:
        sign_in(AZURE, quiet)
    assert "the.secret.token" not in caplog.text + str(caught.value)


# Judging a token


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": f"api://{CLIENT}"},
        {"scp": "read publish"},
        {"azp": None, "appid": CLIENT},
        {"nbf": None, "iat": None},
    ],
)
def test_a_token_in_order_is_accepted(azure: StandIn, changes: dict[str, Any]) -> None:
    assert validate(AZURE, azure.token(**changes)).object_id == PERSON


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aud": OTHER}, "another application"),
        ({"aud": f"api://{CLIENT}/publish"}, "another application"),
        ({"aud": "00000003-0000-0000-c000-000000000000"}, "another application"),
        ({"aud": None}, '"aud" claim'),
        ({"iss": f"https://login.microsoftonline.com/{TENANT}/v2.0"}, "another tenant"),
        ({"iss": f"https://sts.windows.net/{TENANT}/"}, "version 1"),
        ({"iss": None}, '"iss" claim'),
        ({"tid": OTHER}, f"tenant {OTHER}"),
        ({"tid": None}, '"tid" claim'),
        ({"oid": None}, '"oid" claim'),
        ({"exp": 1}, "expired"),
        ({"exp": None}, '"exp" claim'),
        ({"exp": "soon"}, "exp"),
        ({"nbf": 1 << 40}, "not valid yet"),
        ({"scp": None}, "scope `publish`"),
        ({"scp": "publishing"}, "scope `publish`"),
        ({"scp": None, "roles": ["publish"]}, "scope `publish`"),
        ({"azp": OTHER}, f"application {OTHER}"),
        ({"azp": None}, "application None"),
    ],
)
def test_a_token_not_in_order_is_refused(
    azure: StandIn, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(AuthError, match=words) as caught:
        validate(AZURE, azure.token(**changes))
    assert "nothing was deployed" in caught.value.message
    assert caught.value.hint


def test_a_token_that_just_expired_has_expired(azure: StandIn) -> None:
    now = azure.usual_claims()["iat"]
    with pytest.raises(AuthError, match="it has expired"):
        validate(AZURE, azure.token(exp=now - 1))


def test_a_clock_that_is_a_little_behind_does_no_harm(azure: StandIn) -> None:
    now = azure.usual_claims()["iat"]
    validate(AZURE, azure.token(iat=now + 30, nbf=now + 30))


def test_a_token_of_another_tenant_is_refused(azure: StandIn) -> None:
    elsewhere = {"tid": OTHER, "iss": f"{azure.url}/{OTHER}/v2.0"}
    with pytest.raises(AuthError, match="another tenant"):
        validate(AZURE, azure.token(**elsewhere))


def test_only_listed_publishers_may(azure: StandIn) -> None:
    listed = AzureSettings(tenant_id=TENANT, client_id=CLIENT, publishers=[OTHER, PERSON.upper()])
    assert validate(listed, azure.token()).object_id == PERSON
    others = AzureSettings(tenant_id=TENANT, client_id=CLIENT, publishers=[OTHER])
    same_name = {"name": OTHER, "upn": OTHER, "email": OTHER, "preferred_username": OTHER}
    with pytest.raises(AuthError, match=f"object id {PERSON}") as caught:
        validate(others, azure.token(**same_name))
    assert "[azure] publishers" in caught.value.hint


def test_a_name_is_only_shown(azure: StandIn) -> None:
    assert validate(AZURE, azure.token(name=None)).name == "ada@example.com"
    assert validate(AZURE, azure.token(name=None, preferred_username=None)).name == ""
    name = validate(AZURE, azure.token(name="\x1b[31mEve\n" + "e" * 9999)).name
    assert name.startswith("[31mEve e")
    assert name.isprintable()
    assert len(name) <= 200


def test_an_unsigned_token_is_refused(azure: StandIn) -> None:
    for kid in ({"kid": "first"}, {}):
        token = forged({"alg": "none", "typ": "JWT", **kid}, azure.usual_claims(), None)
        with pytest.raises(AuthError, match=r"not signed with RS256|key None"):
            validate(AZURE, token)


def test_a_public_key_is_no_secret(azure: StandIn) -> None:
    public = azure.keys["first"].public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER):
        secret = public.public_bytes(encoding, spki)
        header = {"alg": "HS256", "typ": "JWT", "kid": "first"}
        with pytest.raises(AuthError, match="not signed with RS256"):
            validate(AZURE, forged(header, azure.usual_claims(), secret))


def test_a_shared_secret_among_the_keys_is_not_used(azure: StandIn) -> None:
    secret = base64.urlsafe_b64encode(b"s" * 32).decode().rstrip("=")
    azure.replaced[KEYS] = (200, {"keys": [{"kty": "oct", "kid": "shared", "k": secret}]})
    token = forged({"alg": "HS256", "kid": "shared"}, azure.usual_claims(), b"s" * 32)
    with pytest.raises(AuthError, match="not signed with RS256"):
        validate(AZURE, token)


def test_a_changed_token_is_refused(azure: StandIn) -> None:
    header, _, signature = azure.token().split(".")
    payload = encoded({**azure.usual_claims(), "oid": OTHER})
    with pytest.raises(AuthError, match="its signature is not the tenant's"):
        validate(AZURE, f"{header}.{payload}.{signature}")


def test_each_byte_of_a_signature_counts(azure: StandIn) -> None:
    header, payload, signature = azure.token().split(".")
    raw = base64.urlsafe_b64decode(f"{signature}==")
    for at in range(0, len(raw), 16):
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        changed = base64.urlsafe_b64encode(flipped).rstrip(b"=").decode()
        with pytest.raises(AuthError, match="signature"):
            validate(AZURE, f"{header}.{payload}.{changed}")


def test_a_key_that_the_tenant_does_not_have_is_refused(azure: StandIn) -> None:
    with pytest.raises(AuthError, match="its signature is not the tenant's"):
        validate(AZURE, azure.token("second", {"kid": "first"}))


def test_a_token_does_not_say_where_its_key_is(azure: StandIn) -> None:
    mine = {**azure.answer(KEYS)[1]["keys"][0], "kid": "second"}
    header = {"jku": f"{azure.url}/{TENANT}/elsewhere", "jwk": mine, "x5u": azure.url}
    with pytest.raises(AuthError, match="key second, which is not the tenant's"):
        validate(AZURE, azure.token("second", header))
    assert {endpoint for endpoint, _ in azure.seen} == {KEYS}


def test_who_did_not_sign_in_is_told_how(azure: StandIn) -> None:
    with pytest.raises(AuthError, match="must sign in") as caught:
        validate(AZURE, "")
    assert f"AZURE_TENANT_ID={TENANT}" in caught.value.hint


@given(st.text() | st.from_regex(r"[\w-]{0,20}\.[\w-]{0,20}\.[\w-]{0,20}", fullmatch=True))
def test_garbage_is_refused(token: str) -> None:
    with pytest.raises(AuthError):
        validate(AZURE, token)


def test_from_one_process_to_another(azure: StandIn) -> None:
    """As `casparian publish` and a daemon: real pauses, nothing imported before."""
    azure.answers = ["authorization_pending"]
    code = (
        "import sys\n"
        "from casparian_flow.config import AzureSettings\n"
        "from casparian_flow.security import identity\n"
        f"azure = AzureSettings(tenant_id={TENANT!r}, client_id={CLIENT!r})\n"
        "assert 'msal' not in sys.modules and 'jwt' not in sys.modules\n"
        "token = identity.sign_in(azure, lambda words: print(words, file=sys.stderr))\n"
        "print(token)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert "ABCD-1234" in done.stderr
    assert "stands in for Azure AD" in done.stderr
    assert validate(AZURE, done.stdout.strip()).object_id == PERSON
