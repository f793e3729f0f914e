"""A KMS for a machine without AWS: two operations of ``TrentService``, with real keys, over HTTP.

What it answers has the shape and the error codes of AWS's. The core is sans-IO: :meth:`SoftwareKms.call` takes an
operation's name and its request and returns the answer; :func:`serving` puts it on a port of this machine.

It knows who may sign no better than its caller: a request must look signed (AWS Signature Version 4), and by whom is
not checked. It stands for AWS in tests and demonstrations, and keeps no key beyond its own life.
"""

from __future__ import annotations

import base64
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestation.errors import StrongroomError

SERVICE: Final = "TrentService."
CONTENT_TYPE: Final = "application/x-amz-json-1.1"
MAX_REQUEST: Final = 65_536
"""Bytes of a request's body."""
MAX_MESSAGE: Final = 4096
"""Bytes that Sign takes for itself to hash."""
SECONDS: Final = 30.0
"""How long a connection may be silent."""

SIGN_VERIFY: Final = "SIGN_VERIFY"
KEY_AGREEMENT: Final = "KEY_AGREEMENT"
_CURVES: Final[Mapping[str, tuple[ec.EllipticCurve, str, HashAlgorithm]]] = {
    "ECC_NIST_P256": (ec.SECP256R1(), "ECDSA_SHA_256", SHA256()),
    "ECC_NIST_P384": (ec.SECP384R1(), "ECDSA_SHA_384", SHA384()),
}


class KmsFault(StrongroomError):
    """A refusal, as KMS words it: ``code`` is its ``__type``."""


@dataclass(frozen=True, slots=True)
class _Key:
    arn: str
    spec: str
    usage: str
    private: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"_Key({self.arn}, private=<redacted>)"


class SoftwareKms:
    """The keys of one account in one region."""

    def __init__(self, *, region: str = "us-east-1", account: str = "000000000000") -> None:
        self._prefix = f"arn:aws:kms:{region}:{account}:key/"
        self._keys: dict[str, _Key] = {}

    def create_key(self, *, spec: str = "ECC_NIST_P384", usage: str = SIGN_VERIFY) -> str:
        """A new key; returns its ARN. Raises KmsFault ``ValidationException`` for a spec that is not known here."""
        if spec not in _CURVES or usage not in (SIGN_VERIFY, KEY_AGREEMENT):
            raise KmsFault("ValidationException", f"no keys of spec {spec} and usage {usage}")
        arn = f"{self._prefix}{uuid.uuid4()}"
        self._keys[arn] = _Key(arn, spec, usage, ec.generate_private_key(_CURVES[spec][0]))
        return arn

    def call(self, operation: str, request: Mapping[str, object]) -> dict[str, object]:
        """The answer to one operation, with byte strings in base64 as on the wire. Raises KmsFault."""
        match operation:
            case "GetPublicKey":
                _require_fields(request, {"KeyId", "GrantTokens"})
                return self._get_public_key(self._key(request))
            case "Sign":
                _require_fields(request, {"KeyId", "GrantTokens", "Message", "MessageType", "SigningAlgorithm"})
                return self._sign(self._key(request), request)
        raise KmsFault("UnknownOperationException", f"no operation {operation}")

    def _key(self, request: Mapping[str, object]) -> _Key:
        """The key that a request names by its ARN or by the ARN's last part."""
        name = _text(request, "KeyId")
        arn = name if name.startswith("arn:") else self._prefix + name
        if arn not in self._keys:
            raise KmsFault("NotFoundException", f"Key '{arn}' does not exist")
        return self._keys[arn]

    @staticmethod
    def _get_public_key(key: _Key) -> dict[str, object]:
        spki = key.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        answer: dict[str, object] = {
            "KeyId": key.arn,
            "PublicKey": _to_base64(spki),
            "CustomerMasterKeySpec": key.spec,
            "KeySpec": key.spec,
            "KeyUsage": key.usage,
        }
        if key.usage == SIGN_VERIFY:
            return answer | {"SigningAlgorithms": [_CURVES[key.spec][1]]}
        return answer | {"KeyAgreementAlgorithms": ["ECDH"]}

    @staticmethod
    def _sign(key: _Key, request: Mapping[str, object]) -> dict[str, object]:
        _, algorithm, digest = _CURVES[key.spec]
        if key.usage != SIGN_VERIFY or _text(request, "SigningAlgorithm") != algorithm:
            raise KmsFault("InvalidKeyUsageException", f"{key.arn} is {key.spec} for {key.usage}")
        try:
            message = base64.b64decode(_text(request, "Message"), validate=True)
        except ValueError as error:
            raise KmsFault("SerializationException", "Message is not base64") from error
        match request.get("MessageType", "RAW"):
            case "RAW":
                if not 0 < len(message) <= MAX_MESSAGE:
                    raise KmsFault("ValidationException", f"Message has {len(message)} bytes, not 1 to {MAX_MESSAGE}")
                signature = key.private.sign(message, ec.ECDSA(digest))
            case "DIGEST":
                if len(message) != digest.digest_size:
                    raise KmsFault("ValidationException", f"Digest is invalid length for algorithm {algorithm}")
                signature = key.private.sign(message, ec.ECDSA(Prehashed(digest)))
            case _:
                raise KmsFault("ValidationException", "MessageType is RAW or DIGEST")
        return {"KeyId": key.arn, "Signature": _to_base64(signature), "SigningAlgorithm": algorithm}


def _require_fields(request: Mapping[str, object], known: set[str]) -> None:
    if unknown := request.keys() - known:
        raise KmsFault("ValidationException", f"no such field: {min(unknown)}")


def _text(request: Mapping[str, object], field: str) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        raise KmsFault("ValidationException", f"{field} must be given, as a text")
    return value


def _to_base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode("ascii")


# --- On a port ---------------------------------------------------------------------------------------------------


@contextmanager
def serving(kms: SoftwareKms) -> Iterator[str]:
    """The KMS on a free loopback port; yields the URL, for ``AWS_ENDPOINT_URL_KMS``."""

    class Handler(_Handler):
        service = kms

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    service: SoftwareKms
    timeout = SECONDS

    def do_POST(self) -> None:
        try:
            status, answer = 200, self.service.call(self._operation(), self._request())
        except KmsFault as fault:
            status, answer = 400, {"__type": fault.code, "message": fault.message}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-amzn-RequestId", str(uuid.uuid4()))
        self.end_headers()
        self.wfile.write(body)

    def _operation(self) -> str:
        if not self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
            raise KmsFault("MissingAuthenticationTokenException", "Missing Authentication Token")
        target: str = self.headers.get("X-Amz-Target", "")
        if self.path != "/" or not target.startswith(SERVICE):
            raise KmsFault("UnknownOperationException", "not an operation of TrentService")
        return target.removeprefix(SERVICE)

    def _request(self) -> Mapping[str, object]:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 8 and int(length) <= MAX_REQUEST):
            raise KmsFault("SerializationException", f"a body of at most {MAX_REQUEST} bytes, with its length")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise KmsFault("SerializationException", "the body is not JSON") from error
        if not isinstance(request, dict):
            raise KmsFault("SerializationException", "the body is no JSON object")
        return request

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: whoever starts it wants the answers."""
