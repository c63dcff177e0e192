"""Azure AD: a publisher signs in with a device code (RFC 8628), the Sentinel checks the token.

A token says who publishes and never stands in for the signature. It lives in memory only: it is
not cached, not logged and not stored, and no refresh token is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from casparian_flow.errors import AuthError
from casparian_flow.sections import AzureSettings
from casparian_flow.security import authority

SCOPE = "publish"

_CLOCKS_DIFFER = 60.0  # seconds that a token may seem to be from the future


class Publisher(msgspec.Struct, frozen=True, kw_only=True):
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
    with authority.needed():
        import msal
    url, ca = authority.locate()
    with (
        authority.connect(ca) as session,
        authority.explained(f"cannot sign in at {url}", "nothing was published"),
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
            f"to sign in, open {authority.shown(flow['verification_uri'])} and enter the code "
            f"{authority.shown(flow['user_code'])} within {max(flow['expires_in'] // 60, 1)} min"
        )
        say(f"  for tenant {azure.tenant_id}, application {azure.client_id}")
        say("  never enter a code you did not start")
        reply = app.acquire_token_by_device_flow(flow)
        if "access_token" not in reply:
            raise _refusal(reply)
        return str(reply["access_token"])


def validate(azure: AzureSettings, token: str) -> Publisher:
    """Who published, if this is a token of our tenant, for our API, of somebody who may.

    Blocks for up to half a minute where the authority's keys must be fetched and it is slow.

    Args:
        token: what the publisher sent; empty where they did not sign in.

    Raises:
        AuthError: the token is not in order, its owner may not publish, or the authority's keys
            could not be fetched.
        ConfigError: the test authority cannot be used.
    """
    with authority.needed():
        import jwt
    if not token:
        raise AuthError(
            "publishers sign in to Azure AD here, and this one did not; nothing was deployed",
            f"export AZURE_TENANT_ID={azure.tenant_id} AZURE_CLIENT_ID={azure.client_id}, "
            "and publish again",
        )
    url, ca = authority.locate()
    issuer = f"{url}/{azure.tenant_id}/v2.0"
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        key = authority.keys(f"{url}/{azure.tenant_id}/discovery/v2.0/keys", ca).find(key_id)
        if key is None:
            raise _doubt(
                f"it is signed with key {authority.shown(key_id)}, which is not the tenant's",
                f"publish again; if the tenant has a new key, in {authority.KEYS_PAUSE:.0f} s",
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
        words, hint = _FAULTS.get(type(error).__name__, (authority.shown(error), "publish again"))
        raise _doubt(words, hint) from error
    for is_so, words, hint in _conditions(azure, claims):
        if not is_so:
            raise _doubt(words, hint)
    return Publisher(
        tenant=claims["tid"],
        object_id=str(claims["oid"]),
        issuer=issuer,
        name=authority.shown(claims.get("name") or claims.get("preferred_username") or ""),
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
        f"it is of tenant {authority.shown(claims['tid'])}",
        "publish with the AZURE_TENANT_ID that the daemon has",
    )
    client = claims.get("azp") or claims.get("appid")
    yield (
        client == azure.client_id,
        f"it was given to application {authority.shown(client)}, which is not this one",
        "publish with the AZURE_CLIENT_ID that the daemon has",
    )
    yield (
        SCOPE in str(claims.get("scp", "")).split(),
        f"it does not have the scope `{SCOPE}`",
        f"expose the scope `{SCOPE}` in the application's registration, and publish again",
    )
    yield (
        not azure.publishers or claims["oid"] in azure.publishers,
        f"object id {authority.shown(claims['oid'])} is not among those who may publish",
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
        f"Azure AD refused the sign-in: {authority.first_line(reply)}",
        "check AZURE_CLIENT_ID and the application's registration, then publish again",
    )
    words, hint = _REFUSALS.get(str(reply.get("error")), fallback)
    return AuthError(f"{words}; nothing was published", hint)
