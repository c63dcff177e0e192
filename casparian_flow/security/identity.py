"""Azure AD: a publisher signs in with a device code (RFC 8628); the daemon checks the token.

A token identifies the publisher and does not replace the signature. It stays in memory: it is
never cached, logged or stored, and no refresh token is requested.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from casparian_flow import config
from casparian_flow.config import AzureSettings
from casparian_flow.errors import AuthError

if TYPE_CHECKING:
    from jwt import PyJWK
    from requests import Response, Session

# Connections to Azure AD, their errors, and the keys that sign its tokens.
#
# If `config.test_authority` names a stand-in, it replaces Azure AD, proxy and CA variables are
# ignored, and a warning is logged. Its issuer is `<authority>/<tenant id>/v2.0`, its keys are at
# `<authority>/<tenant id>/discovery/v2.0/keys`.

AZURE_AD = "https://login.microsoftonline.com"

KEYS_LAST = 3600.0
"""Seconds until the keys are fetched again, so that a withdrawn key does not stay valid."""

KEYS_PAUSE = 30.0
"""Shortest time in seconds between fetches for unknown keys: any token can name one."""

_TIMEOUT = (5.0, 20.0)  # seconds to connect, and between two reads
_SHOWN = 200

_log = logging.getLogger(__name__)


def locate() -> tuple[str, str | None]:
    """The authority's URL, and the CA file to trust there; None: the system's CAs.

    Raises:
        ConfigError: the test authority cannot be used.
    """
    stand_in = config.test_authority()
    if stand_in is None:
        return AZURE_AD, None
    _log.warning("CASPARIAN_TEST_AUTHORITY is set: %s stands in for Azure AD", stand_in.url)
    return stand_in.url, str(stand_in.ca)


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Turn a failed import in the block into an error that says what to install.

    Raises:
        AuthError: a package is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise AuthError(
            f"publishers must sign in to Azure AD here, but {error.name} is not installed",
            "pip install 'casparian-flow[azure]'",
        ) from error


def connect_authority(ca: str | None) -> Session:
    """A session for TLS connections only, with timeouts; the caller closes it."""
    import requests

    session = requests.Session()
    session.adapters.pop("http://")
    session.hooks["response"] = [_check]
    # A session has no timeout setting; msal's documentation suggests this.
    session.request = functools.partial(  # type: ignore[method-assign]
        session.request, timeout=_TIMEOUT
    )
    if ca is not None:
        session.trust_env = False  # else REQUESTS_CA_BUNDLE would win over `verify`
        session.verify = ca
    return session


def _check(response: Response, **_: Any) -> None:
    """Raise on an unexpected response before msal logs its body, which may hold a token."""
    from requests import HTTPError

    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or not (status == 200 or 400 <= status < 429):
        raise HTTPError(f"it answered HTTP {status} without an explanation")
    if response.request.method == "GET" and status != 200:
        raise HTTPError(f"it answered HTTP {status}, {first_line(body)}")


@contextlib.contextmanager
def explained(what: str, unchanged: str) -> Iterator[None]:
    """Turn errors of a request to the authority into an AuthError.

    Args:
        what: what could not be done.
        unchanged: what was not changed because of it, for the message.

    Raises:
        AuthError: the request failed.
    """
    import requests

    try:
        yield
    except requests.exceptions.SSLError as error:
        raise AuthError(
            f"{what}: its TLS certificate is not trusted ({_reason(error)}); {unchanged}",
            "behind a proxy that reads TLS: export REQUESTS_CA_BUNDLE=/path/to/its/ca.pem",
        ) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise AuthError(
            f"{what}: it cannot be reached ({_reason(error)}); {unchanged}",
            "check the network, and HTTPS_PROXY where there is a proxy; then publish again",
        ) from error
    # OSError: other errors of requests, and a missing CA file. msal raises the others when a
    # response lacks a field.
    except (OSError, ValueError, LookupError) as error:
        raise AuthError(
            f"{what}: {shown(error)}; {unchanged}",
            "check AZURE_TENANT_ID and REQUESTS_CA_BUNDLE, then publish again",
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost error: requests and urllib3 wrap it."""
    while error.__context__ is not None:
        error = error.__context__
    return shown(error)


class KeySet:
    """Cache of an authority's public keys; fetches them when a token names an unknown key."""

    def __init__(self, url: str, ca: str | None) -> None:
        self._url = url
        self._ca = ca
        self._lock = threading.Lock()
        self._known: dict[str, PyJWK] = {}
        self._good_until = 0.0
        self._paused_until = 0.0

    def find(self, key_id: str | None) -> PyJWK | None:
        """The key with this id, which is untrusted input; None if the authority has no such key.

        Raises:
            AuthError: the keys could not be fetched.
        """
        with self._lock:
            now = time.monotonic()
            if now >= self._good_until:
                self._fetch()
            elif key_id not in self._known and now >= self._paused_until:
                self._paused_until = now + KEYS_PAUSE
                self._fetch()
            return self._known.get(key_id) if key_id else None

    def _fetch(self) -> None:
        import jwt

        with (
            connect_authority(self._ca) as session,
            explained(f"cannot check the sign-in with {self._url}", "nothing was deployed"),
        ):
            try:
                keys = jwt.PyJWKSet.from_dict(session.get(self._url).json())
            except jwt.PyJWTError as error:
                raise ValueError(str(error)) from error
        self._known = {key.key_id: key for key in keys if key.key_id}
        self._good_until = time.monotonic() + KEYS_LAST


@functools.cache
def authority_keys(url: str, ca: str | None) -> KeySet:
    """The cache of an authority's keys, one a process."""
    return KeySet(url, ca)


def first_line(reply: dict[str, Any]) -> str:
    """An OAuth error in one line, without the trace ids that Azure AD adds below."""
    description = str(reply.get("error_description") or "").partition("\n")[0]
    return shown(f"{reply.get('error')}: {description}".rstrip(": .\r"))


def shown(text: object) -> str:
    """Untrusted text, shortened and made safe to print."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:_SHOWN]).strip()


SCOPE = "publish"

_CLOCK_SKEW_SECONDS = 60.0


class AzureUser(msgspec.Struct, frozen=True, kw_only=True):
    """The person who published, from a token that the tenant signed."""

    tenant: str
    """GUID of the tenant."""

    object_id: str
    """GUID of the person in the tenant. Both are the identity, since names and addresses change."""

    issuer: str

    name: str
    """For display only; may be empty."""


def sign_in(azure: AzureSettings, say: Callable[[str], None]) -> str:
    """Sign in through a browser and return the access token for our API.

    Blocks until the user signs in, declines, or the code expires. Ctrl-C stops it.

    Args:
        say: prints a line for the user: the address and the code.

    Raises:
        AuthError: the user declined, the code expired, or the authority refused or is unreachable.
        ConfigError: the test authority cannot be used.
    """
    with needed():
        import msal
    url, ca = locate()
    with (
        connect_authority(ca) as session,
        explained(f"cannot sign in at {url}", "nothing was published"),
    ):
        app = msal.PublicClientApplication(
            azure.client_id,
            authority=f"{url}/{azure.tenant_id}",
            http_client=session,
            instance_discovery=False,  # else msal asks a Microsoft host about the authority
            exclude_scopes=["offline_access"],  # no refresh token
        )
        flow = app.initiate_device_flow([f"api://{azure.client_id}/{SCOPE}"])
        if "user_code" not in flow:
            raise _refusal(flow)
        flow["interval"] = max(flow["interval"], 1)  # at 0, msal would poll without a pause
        say(
            f"to sign in, open {shown(flow['verification_uri'])} and enter the code "
            f"{shown(flow['user_code'])} within {max(flow['expires_in'] // 60, 1)} min"
        )
        say(f"  for tenant {azure.tenant_id}, application {azure.client_id}")
        say("  never enter a code you did not start")
        reply = app.acquire_token_by_device_flow(flow)
        if "access_token" not in reply:
            raise _refusal(reply)
        return str(reply["access_token"])


def validate(azure: AzureSettings, token: str) -> AzureUser:
    """Check a token: signed by our tenant, for our API, of a person who may publish.

    May block for half a minute to fetch the authority's keys.

    Args:
        token: from the publisher; empty if they did not sign in.

    Returns:
        The person who published.

    Raises:
        AuthError: the token is invalid, its owner may not publish, or the authority's keys could
            not be fetched.
        ConfigError: the test authority cannot be used.
    """
    with needed():
        import jwt
    if not token:
        raise AuthError(
            "publishers must sign in to Azure AD here, and you did not; nothing was deployed",
            f"export AZURE_TENANT_ID={azure.tenant_id} AZURE_CLIENT_ID={azure.client_id}, "
            "and publish again",
        )
    url, ca = locate()
    issuer = f"{url}/{azure.tenant_id}/v2.0"
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        key = authority_keys(f"{url}/{azure.tenant_id}/discovery/v2.0/keys", ca).find(key_id)
        if key is None:
            raise _invalid(
                f"it is signed with key {shown(key_id)}, which is not the tenant's",
                f"publish again; if the tenant has a new key, in {KEYS_PAUSE:.0f} s",
            )
        claims = jwt.decode(
            token,
            key,
            algorithms=["RS256"],
            audience=[azure.client_id, f"api://{azure.client_id}"],
            issuer=issuer,
            options={"require": ["exp", "iss", "aud", "tid", "oid"]},
            leeway=_CLOCK_SKEW_SECONDS,
        )
    except jwt.PyJWTError as error:
        fault, hint = _FAULTS.get(type(error).__name__, (shown(error), "publish again"))
        raise _invalid(fault, hint) from error
    for met, fault, hint in _conditions(azure, claims):
        if not met:
            raise _invalid(fault, hint)
    return AzureUser(
        tenant=claims["tid"],
        object_id=str(claims["oid"]),
        issuer=issuer,
        name=shown(claims.get("name") or claims.get("preferred_username") or ""),
    )


def _invalid(fault: str, hint: str) -> AuthError:
    return AuthError(f"the sign-in to Azure AD is not valid: {fault}; nothing was deployed", hint)


_FAULTS = {
    "ExpiredSignatureError": ("it has expired", "publish again, and sign in when asked"),
    "ImmatureSignatureError": ("it is not valid yet", "set this machine's clock"),
    "InvalidAlgorithmError": ("it is not signed with RS256", "publish again"),
    "InvalidSignatureError": ("its signature is not the tenant's", "publish again"),
    "InvalidAudienceError": (
        "it is for another application",
        "publish with the AZURE_CLIENT_ID that the daemon has",
    ),
    "InvalidIssuerError": (
        "it is from another tenant, or in the version 1 format",
        "publish with the daemon's AZURE_TENANT_ID; in the application's manifest set "
        '"requestedAccessTokenVersion": 2',
    ),
}
"""Error of PyJWT -> message and hint."""


def _conditions(azure: AzureSettings, claims: dict[str, Any]) -> Iterator[tuple[bool, str, str]]:
    """Conditions on a token that the tenant signed: (met, message, hint)."""
    yield (
        int(claims["exp"]) > time.time(),  # PyJWT allows the clock skew here too
        *_FAULTS["ExpiredSignatureError"],
    )
    yield (
        claims["tid"] == azure.tenant_id,
        f"it is of tenant {shown(claims['tid'])}",
        "publish with the AZURE_TENANT_ID that the daemon has",
    )
    client = claims.get("azp") or claims.get("appid")
    yield (
        client == azure.client_id,
        f"it was given to application {shown(client)}, which is not this one",
        "publish with the AZURE_CLIENT_ID that the daemon has",
    )
    yield (
        SCOPE in str(claims.get("scp", "")).split(),
        f"it does not have the scope `{SCOPE}`",
        f"expose the scope `{SCOPE}` in the application's registration, and publish again",
    )
    yield (
        not azure.publishers or claims["oid"] in azure.publishers,
        f"object id {shown(claims['oid'])} may not publish here",
        "ask the owner of the daemon's configuration to add it to [azure] publishers",
    )


_DECLINED = (
    "the sign-in was declined in the browser",
    "publish again; if you did not decline it, somebody else had the code",
)
_EXPIRED = (
    "the code expired before it was used",
    "publish again, and enter the new code in time",
)
_REFUSALS = {
    "authorization_declined": _DECLINED,  # Azure AD
    "access_denied": _DECLINED,  # RFC 8628
    "expired_token": _EXPIRED,
    "authorization_pending": _EXPIRED,  # the last response before msal stopped polling
    "slow_down": _EXPIRED,
    "bad_verification_code": ("Azure AD no longer knows the code", "publish again"),
    "invalid_client": (
        "Azure AD does not let this application sign in with a code",
        "in its registration, under Authentication, allow public client flows",
    ),
}
"""Error code of RFC 8628 or of Azure AD -> message and hint."""


def _refusal(reply: dict[str, Any]) -> AuthError:
    fallback = (
        f"Azure AD refused the sign-in: {first_line(reply)}",
        "check AZURE_CLIENT_ID and the application's registration, then publish again",
    )
    message, hint = _REFUSALS.get(str(reply.get("error")), fallback)
    return AuthError(f"{message}; nothing was published", hint)
