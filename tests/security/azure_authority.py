"""A local stand-in for Azure AD: TLS with a CA of its own, device codes, tokens and keys."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ipaddress
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from casparian_flow.config import AzureSettings

TENANT = "11111111-2222-4333-8444-abcdefabcdef"
CLIENT = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
PERSON = "99999999-8888-4777-8666-fedcbafedcba"
OTHER = "00000000-1111-4222-8333-444444444444"

AZURE = AzureSettings(tenant_id=TENANT, client_id=CLIENT)

DISCOVERY = "/v2.0/.well-known/openid-configuration"
DEVICE = "/oauth2/v2.0/devicecode"
TOKEN = "/oauth2/v2.0/token"
KEYS = "/discovery/v2.0/keys"

DEVICE_CODE = {
    "device_code": "the-device-code",
    "user_code": "ABCD-1234",
    "verification_uri": "https://login.example/device",
    "expires_in": 900,
    "interval": 0,
    "message": "what Azure AD would say",
}


class Clock:
    """Time that passes when somebody sleeps, for msal and for the cache of keys."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.slept = 0.0

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


class StandIn:
    """One tenant of one authority, at `url`, trusted by whoever trusts `ca`."""

    def __init__(self, ca: Path, server_pem: Path, keys: dict[str, rsa.RSAPrivateKey]) -> None:
        self.ca = ca
        self.keys = keys
        self.published = ["first"]
        """Names of those keys that its key set has."""
        self.answers: list[str] = []
        """Errors that the token endpoint gives, one a poll, before the token."""
        self.replaced: dict[str, tuple[int, Any]] = {}
        """For an endpoint: another status and body than the usual ones."""
        self.seen: list[tuple[str, dict[str, str]]] = []
        """Requests so far: the endpoint, and the form in it."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server_pem)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def visits(self, endpoint: str) -> int:
        return sum(each == endpoint for each, _ in self.seen)

    def token(
        self, key: str = "first", header: dict[str, Any] | None = None, **changes: Any
    ) -> str:
        """A signed access token, with these changes to its claims; None: without that claim."""
        claims = {**self.usual_claims(), **changes}
        present = {name: value for name, value in claims.items() if value is not None}
        names = {"kid": key, **(header or {})}
        return jwt.encode(present, self.keys[key], algorithm="RS256", headers=names)

    def usual_claims(self) -> dict[str, Any]:
        now = int(time.time())
        return {
            "aud": CLIENT,
            "iss": f"{self.url}/{TENANT}/v2.0",
            "iat": now,
            "nbf": now,
            "exp": now + 3600,
            "azp": CLIENT,
            "name": "Ada Lovelace",
            "oid": PERSON,
            "preferred_username": "ada@example.com",
            "scp": "publish",
            "sub": "a-pairwise-subject",
            "tid": TENANT,
            "ver": "2.0",
        }

    def answer(self, endpoint: str) -> tuple[int, Any]:
        if endpoint in self.replaced:
            return self.replaced[endpoint]
        if endpoint == DISCOVERY:
            base = f"{self.url}/{TENANT}"
            return 200, {
                "issuer": f"{base}/v2.0",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "token_endpoint": f"{base}{TOKEN}",
                "device_authorization_endpoint": f"{base}{DEVICE}",
                "jwks_uri": f"{base}{KEYS}",
            }
        if endpoint == DEVICE:
            return 200, DEVICE_CODE
        if endpoint == TOKEN:
            if self.answers:
                error = self.answers.pop(0)
                return 400, {"error": error, "error_description": f"AADSTS7: {error}\r\nTrace: 1"}
            return 200, {"token_type": "Bearer", "access_token": self.token(), "expires_in": 3600}
        if endpoint == KEYS:
            return 200, {"keys": [self._public(name) for name in self.published]}
        return 404, {"error": "not_found"}

    def _public(self, name: str) -> dict[str, Any]:
        public = self.keys[name].public_key()
        return {**jwt.algorithms.RSAAlgorithm.to_jwk(public, as_dict=True), "kid": name}


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self._reply({name: values[0] for name, values in parse_qs(body).items()})

        def _reply(self, form: dict[str, str]) -> None:
            _, _, endpoint = self.path.partition(TENANT)
            stand_in.seen.append((endpoint, form))
            status, body = stand_in.answer(endpoint)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if 300 <= status < 400:
                self.send_header("Location", f"{stand_in.url}/{TENANT}/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def make_ca(folder: Path) -> tuple[Path, Path]:
    """A new CA's certificate, and a certificate with its key for localhost; both in PEM."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, public: Any, is_ca: bool) -> x509.Certificate:
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        issuer = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca of a test")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(_usage(is_ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), False
            )
            .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        )
        return builder.sign(ca_key, hashes.SHA256())

    pem = serialization.Encoding.PEM
    ca_file, server_file = folder / "ca.pem", folder / "server.pem"
    ca_file.write_bytes(certificate("ca of a test", ca_key.public_key(), True).public_bytes(pem))
    server_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate("localhost", key.public_key(), False).public_bytes(pem)
    )
    return ca_file, server_file


def _usage(is_ca: bool) -> x509.KeyUsage:
    """What a certificate's key is for; RFC 5280 wants it of a CA, and Python 3.13 checks it."""
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def encoded(part: Any) -> str:
    """A part of a token, from its JSON."""
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def forged(header: dict[str, Any], claims: dict[str, Any], secret: bytes | None) -> str:
    """A token made by hand; PyJWT would not sign with a public key as HMAC's secret."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    if secret is None:
        return f"{signed}."
    mac = hmac.digest(secret, signed.encode(), hashlib.sha256)
    return f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def quiet(words: str) -> None:
    """A `say` for those who do not listen."""
