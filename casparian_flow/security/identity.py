"""Azure AD: a publisher signs in with a device code (RFC 8628), the Sentinel checks the token.

A token says who publishes and never stands in for the signature. It lives in memory only: it is
not cached, not logged and not stored, and no refresh token is asked for.
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


# Talking to Azure AD: connections, what goes wrong on them, and the keys it signs tokens with.
#
# Where `config.test_authority` names a stand-in, that is talked to and nothing else, whatever
# proxies and CA variables the environment has, and the log says so. Its issuer is
# `<authority>/<tenant id>/v2.0`, and its keys are at `<authority>/<tenant id>/discovery/v2.0/keys`.


AZURE_AD = "https://login.microsoftonline.com"

KEYS_LAST = 3600.0
"""Seconds after which an authority's keys are fetched anew: one it withdrew must not stay."""

KEYS_PAUSE = 30.0
"""Seconds between fetches because of unknown keys, which anybody can name in a token."""

_TIMEOUT = (5.0, 20.0)  # seconds to connect, and between two reads
_SHOWN = 200

_log = logging.getLogger(__name__)


def locate() -> tuple[str, str | None]:
    """Where identities come from, and the CA to trust there; None: those of the machine.

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
    """Say how to install what an import inside did not find.

    Raises:
        AuthError: with those words.
    """
    try:
        yield
    except ImportError as error:
        raise AuthError(
            f"publishers sign in to Azure AD here, but {error.name} is not installed",
            "pip install 'casparian-flow[azure]'",
        ) from error


def connect_authority(ca: str | None) -> Session:
    """Connections over TLS only, with time limits; the caller closes them."""
    import requests

    session = requests.Session()
    session.adapters.pop("http://")
    session.hooks["response"] = [_check]
    # A session has no setting for it; msal's documentation does it like this.
    session.request = functools.partial(  # type: ignore[method-assign]
        session.request, timeout=_TIMEOUT
    )
    if ca is not None:
        session.trust_env = False  # else REQUESTS_CA_BUNDLE would win over `verify`
        session.verify = ca
    return session


def _check(response: Response, **_: Any) -> None:
    """Stop at an answer that is none, before msal logs it whole: it may have a token in it."""
    from requests import HTTPError

    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or not (status == 200 or 400 <= status < 429):
        raise HTTPError(f"it answered HTTP {status}, with nothing of use")
    if response.request.method == "GET" and status != 200:
        raise HTTPError(f"it answered HTTP {status}, {first_line(body)}")


@contextlib.contextmanager
def explained(what: str, kept: str) -> Iterator[None]:
    """Say in words why the authority could not be talked to.

    Args:
        what: could not be done, with whom.
        kept: what did not happen because of it.

    Raises:
        AuthError: with those words.
    """
    import requests

    try:
        yield
    except requests.exceptions.SSLError as error:
        raise AuthError(
            f"{what}: its TLS certificate is not to be trusted ({_reason(error)}); {kept}",
            "behind a proxy that reads TLS: export REQUESTS_CA_BUNDLE=/path/to/its/ca.pem",
        ) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise AuthError(
            f"{what}: it cannot be reached ({_reason(error)}); {kept}",
            "check the network, and HTTPS_PROXY where there is a proxy; then publish again",
        ) from error
    # OSError: other errors of requests, and a CA file that is not there. The rest is what msal
    # raises where an answer lacks something.
    except (OSError, ValueError, LookupError) as error:
        raise AuthError(
            f"{what}: {shown(error)}; {kept}",
            "check AZURE_TENANT_ID and REQUESTS_CA_BUNDLE, then publish again",
        ) from error


def _reason(error: BaseException) -> str:
    """What is at the bottom of requests' and urllib3's wrappings."""
    while error.__context__ is not None:
        error = error.__context__
    return shown(error)


class KeySet:
    """The public keys of an authority, fetched when a token names one that is not known."""

    def __init__(self, url: str, ca: str | None) -> None:
        self._url = url
        self._ca = ca
        self._lock = threading.Lock()
        self._known: dict[str, PyJWK] = {}
        self._good_until = 0.0
        self._paused_until = 0.0

    def find(self, key_id: str | None) -> PyJWK | None:
        """The key of that name, which a stranger may have made up; None where there is none.

        Raises:
            AuthError: the authority was asked, and gave no keys.
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
                found = jwt.PyJWKSet.from_dict(session.get(self._url).json())
            except jwt.PyJWTError as error:
                raise ValueError(str(error)) from error
        self._known = {key.key_id: key for key in found if key.key_id}
        self._good_until = time.monotonic() + KEYS_LAST


@functools.cache
def authority_keys(url: str, ca: str | None) -> KeySet:
    """One cache an authority; there is one in a process, outside of tests."""
    return KeySet(url, ca)


def first_line(reply: dict[str, Any]) -> str:
    """An OAuth error in one line; what Azure AD adds below is for its own logs."""
    description = str(reply.get("error_description") or "").partition("\n")[0]
    return shown(f"{reply.get('error')}: {description}".rstrip(": .\r"))


def shown(text: object) -> str:
    """Somebody else's text, made safe to print."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:_SHOWN]).strip()


SCOPE = "publish"

_CLOCKS_DIFFER = 60.0  # seconds that a token may seem to be from the future


class AzureUser(msgspec.Struct, frozen=True, kw_only=True):
    """Who published, as their tenant vouches for it."""

    tenant: str
    """GUID of the tenant."""

    object_id: str
    """GUID of the person in it: with `tenant` the identity, since names and addresses change."""

    issuer: str

    name: str
    """For people to read, and for nothing else; may be empty."""


def sign_in(azure: AzureSettings, say: Callable[[str], None]) -> str:
    """Have the person sign in in a browser; the access token for our API.

    Blocks until they did, declined, or the code expired; Ctrl-C ends it and leaves nothing behind.

    Args:
        say: is given each line that the person must read, the code among them.

    Raises:
        AuthError: they declined or came too late, or the authority refused or was not reached.
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
            instance_discovery=False,  # the authority is known: nobody else is asked about it
            exclude_scopes=["offline_access"],  # no refresh token
        )
        flow = app.initiate_device_flow([f"api://{azure.client_id}/{SCOPE}"])
        if "user_code" not in flow:
            raise _refusal(flow)
        flow["interval"] = max(flow["interval"], 1)  # with 0, msal would ask without a pause
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
    """Who published, if this is a token of our tenant, for our API, of somebody who may.

    Blocks for up to half a minute where the authority's keys must be fetched and it is slow.

    Args:
        token: what the publisher sent; empty where they did not sign in.

    Raises:
        AuthError: the token is not in order, its owner may not publish, or the authority's keys
            could not be fetched.
        ConfigError: the test authority cannot be used.
    """
    with needed():
        import jwt
    if not token:
        raise AuthError(
            "publishers sign in to Azure AD here, and this one did not; nothing was deployed",
            f"export AZURE_TENANT_ID={azure.tenant_id} AZURE_CLIENT_ID={azure.client_id}, "
            "and publish again",
        )
    url, ca = locate()
    issuer = f"{url}/{azure.tenant_id}/v2.0"
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        key = authority_keys(f"{url}/{azure.tenant_id}/discovery/v2.0/keys", ca).find(key_id)
        if key is None:
            raise _doubt(
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
            leeway=_CLOCKS_DIFFER,
        )
    except jwt.PyJWTError as error:
        words, hint = _FAULTS.get(type(error).__name__, (shown(error), "publish again"))
        raise _doubt(words, hint) from error
    for is_so, words, hint in _conditions(azure, claims):
        if not is_so:
            raise _doubt(words, hint)
    return AzureUser(
        tenant=claims["tid"],
        object_id=str(claims["oid"]),
        issuer=issuer,
        name=shown(claims.get("name") or claims.get("preferred_username") or ""),
    )


def _doubt(words: str, hint: str) -> AuthError:
    return AuthError(f"the sign-in to Azure AD does not hold: {words}; nothing was deployed", hint)


_FAULTS = {
    "ExpiredSignatureError": ("it has expired", "publish again, and sign in when asked"),
    "ImmatureSignatureError": ("it is not valid yet", "set this machine's clock"),
    "InvalidAlgorithmError": ("it is not signed with RS256", "publish again"),
    "InvalidSignatureError": ("its signature is not the tenant's", "publish again"),
    "InvalidAudienceError": (
        "it was given for another application",
        "publish with the AZURE_CLIENT_ID that the daemon has",
    ),
    "InvalidIssuerError": (
        "it was given by another tenant, or in the format of version 1",
        "publish with the daemon's AZURE_TENANT_ID; in the application's manifest set "
        '"requestedAccessTokenVersion": 2',
    ),
}
"""What PyJWT found, in words, and what to do about it."""


def _conditions(azure: AzureSettings, claims: dict[str, Any]) -> Iterator[tuple[bool, str, str]]:
    """What must be so besides, in a token that the tenant signed; never a name or an address."""
    yield (
        int(claims["exp"]) > time.time(),  # PyJWT forgave it the difference of the clocks
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
        f"object id {shown(claims['oid'])} is not among those who may publish",
        "ask whoever keeps the daemon's configuration to add it to [azure] publishers",
    )


_DECLINED = (
    "the sign-in was declined in the browser",
    "publish again; if you did not decline it, somebody else had the code",
)
_LATE = (
    "the code expired before anybody signed in with it",
    "publish again, and enter the new code in time",
)
_REFUSALS = {
    "authorization_declined": _DECLINED,  # Azure AD
    "access_denied": _DECLINED,  # RFC 8628
    "expired_token": _LATE,
    "authorization_pending": _LATE,  # what was answered last, when msal stopped asking
    "slow_down": _LATE,
    "bad_verification_code": ("Azure AD does not know the code any more", "publish again"),
    "invalid_client": (
        "Azure AD does not let this application sign in with a code",
        "in its registration, under Authentication, allow public client flows",
    ),
}
"""Answers of RFC 8628 and of Azure AD: what each means, and what to do about it."""


def _refusal(reply: dict[str, Any]) -> AuthError:
    """The error for what the authority answered instead of a token."""
    fallback = (
        f"Azure AD refused the sign-in: {first_line(reply)}",
        "check AZURE_CLIENT_ID and the application's registration, then publish again",
    )
    words, hint = _REFUSALS.get(str(reply.get("error")), fallback)
    return AuthError(f"{words}; nothing was published", hint)
