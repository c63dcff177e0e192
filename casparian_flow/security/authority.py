"""Talking to Azure AD: connections, what goes wrong on them, and the keys it signs tokens with.

Where `config.test_authority` names a stand-in, that is talked to and nothing else, whatever proxies
and CA variables the environment has, and the log says so. Its issuer is
`<authority>/<tenant id>/v2.0`, and its keys are at `<authority>/<tenant id>/discovery/v2.0/keys`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from casparian_flow import config
from casparian_flow.errors import AuthError

if TYPE_CHECKING:
    from jwt import PyJWK
    from requests import Response, Session

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


def connect(ca: str | None) -> Session:
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


class Keys:
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
            connect(self._ca) as session,
            explained(f"cannot check the sign-in with {self._url}", "nothing was deployed"),
        ):
            try:
                found = jwt.PyJWKSet.from_dict(session.get(self._url).json())
            except jwt.PyJWTError as error:
                raise ValueError(str(error)) from error
        self._known = {key.key_id: key for key in found if key.key_id}
        self._good_until = time.monotonic() + KEYS_LAST


@functools.cache
def keys(url: str, ca: str | None) -> Keys:
    """One cache an authority; there is one in a process, outside of tests."""
    return Keys(url, ca)


def first_line(reply: dict[str, Any]) -> str:
    """An OAuth error in one line; what Azure AD adds below is for its own logs."""
    description = str(reply.get("error_description") or "").partition("\n")[0]
    return shown(f"{reply.get('error')}: {description}".rstrip(": .\r"))


def shown(text: object) -> str:
    """Somebody else's text, made safe to print."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:_SHOWN]).strip()
